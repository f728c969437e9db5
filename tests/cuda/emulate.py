"""Compiles kernels with g++ and tests/cuda/emulator.h, and launches them as the driver would.

CQ_EMULATE_FLAGS adds compiler flags (the sanitizers' run sets it). Libraries stay in build/emulated, by the hash of all
they are made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pyggml_bridge.cuda.kernels import Launch, Module

ROOT = Path(__file__).resolve().parents[2]
SOURCES, EMULATOR = ROOT / "native" / "cuda", Path(__file__).parent
CACHE = ROOT / "build" / "emulated"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)


def flags() -> list[str]:
    return [*FLAGS, *os.environ.get("CQ_EMULATE_FLAGS", "").split()]


@cache
def _inputs() -> bytes:
    texts = [path.read_text() for path in (*sorted(SOURCES.iterdir()), *sorted(EMULATOR.glob("*.h")))]
    return "\0".join([*texts, *flags()]).encode()


def _compiled(name: str, suffix: str, text: str, *command: str) -> Path:
    """The compiler's output for a source text, kept by hash."""
    path = CACHE / f"{name}-{hashlib.sha256(_inputs() + text.encode()).hexdigest()[:16]}" / f"{name}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        source, partial = path.parent / f"{name}.cc", path.parent / f"{os.getpid()}.partial"
        source.write_text(text)
        done = subprocess.run(
            ["g++", *flags(), *command, str(source), "-o", str(partial)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        partial.rename(path)
    return path


def compiled_text(name: str, text: str, kernels: list[str]) -> ctypes.CDLL:
    """A source text as an emulated module: for each kernel `k` a function `k_launch`."""
    lines = [text, *(f"CQ_EMULATE({kernel})" for kernel in kernels)]
    command = ("-shared", f"-I{_header().parent}", "-include", "prefix.h")
    return ctypes.CDLL(str(_compiled(name, ".so", "\n".join(lines), *command)))


@cache
def library(module: Module) -> ctypes.CDLL:
    """The emulated module."""
    source = SOURCES / module.source
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([\w, ]+\)\s*)?(\w+)\(", source.read_text())
    lines = [*(f"#define {name} {value}" for name, value in module.defines), f'#include "{source}"']
    present = [kernel for kernel in kernels if not _absent(module, kernel)]
    return compiled_text(module.source.removesuffix(".cu"), "\n".join(lines), present)


def launch_function(module: ctypes.CDLL, kernel: str) -> Any:
    """(arguments, grid, threads, dynamic shared bytes, seed) -> error text, empty if all went well."""
    function = getattr(module, f"{kernel}_launch")
    function.restype = ctypes.c_char_p
    return function


def struct_layout(source: str, name: str, fields: tuple[str, ...]) -> dict[str, int]:
    """The offsets of a struct's fields in the CUDA sources, as the compiler has them, and by the name "" its size."""
    values = [f"sizeof({name})", *(f"offsetof({name}, {field})" for field in fields)]
    lines = ["#include <cstddef>", f'#include "{SOURCES / source}"']
    lines += [f'extern "C" const size_t layout[] = {{{", ".join(values)}}};']
    command = ("-shared", f"-I{_header().parent}", "-include", "prefix.h", "-Wno-unused-function")
    library = ctypes.CDLL(str(_compiled("layout", ".so", "\n".join(lines), *command)))
    return dict(zip(("", *fields), (ctypes.c_size_t * len(values)).in_dll(library, "layout"), strict=True))


def _header() -> Path:
    return _compiled("prefix.h", ".gch", f'#include "{EMULATOR}/emulator.h"\n', "-x", "c++-header")


def _absent(module: Module, kernel: str) -> bool:
    return kernel == "stock_gemm" and ("CQ_TYPE", 8) in module.defines


def run(launch: Launch, seed: int = 0) -> None:
    """Execute a launch whose addresses are the host's."""
    for axis, size in enumerate(launch.grid):
        assert 0 < size <= (2**31 - 1 if axis == 0 else 65535), f"{launch.kernel}: no device takes a grid {launch.grid}"
    assert launch.shared_bytes <= 48 << 10
    function = launch_function(library(launch.module), launch.kernel)
    values = [np.atleast_1d(argument) for argument in launch.args]
    pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
    grid = (ctypes.c_uint * 3)(*launch.grid)
    error = function(pointers, grid, launch.threads, launch.shared_bytes, seed)
    assert not error, f"{launch.kernel}: {error.decode()}"

"""NVIDIA's run-time compiler: CUDA sources to machine code, no toolkit needed. Compiled modules are kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from ctypes.util import find_library
from functools import cache
from pathlib import Path

from pyggml_bridge.cuda.kernels import Module
from pyggml_bridge.errors import CQError

_INSTALLED, _REPOSITORY = Path(__file__).with_name("sources"), Path(__file__).parents[2] / "native" / "cuda"
SOURCES = _INSTALLED if _INSTALLED.is_dir() else _REPOSITORY
OPTIONS = ("--std=c++17",)


def _candidates() -> list[str]:
    """Where the library may be: the wheels of PyPI, a toolkit, the system's paths."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    toolkit = [Path(os.environ["CUDA_PATH"])] if "CUDA_PATH" in os.environ else []
    found = [path for root in wheels for path in sorted(root.glob("*/lib/libnvrtc.so.*"), reverse=True)]
    found += [path for root in wheels for path in sorted(root.glob("*/bin/**/nvrtc64_*.dll"), reverse=True)]
    found += [path for root in toolkit for path in sorted(root.glob("lib*/libnvrtc.so*"))]
    system = find_library("nvrtc")
    return [*(str(path) for path in found if "alt" not in path.name), *([system] if system else [])]


@cache
def _library() -> ctypes.CDLL:
    for candidate in _candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError:  # another platform's, or an incomplete installation: the next candidate may do
            continue
    raise CQError("--cuda: the NVRTC library is missing (pip install 'codequant-gguf[cuda]')")


def _call(name: str, *args: object) -> None:
    status = getattr(_library(), name)(*args)
    if status:
        raise CQError(f"--cuda: {name} of the NVRTC library failed with {status}")


@cache
def version() -> tuple[int, int]:
    """Of the library; CQError if there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities that it compiles for, as 75, ascending."""
    n = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(n))
    numbers = (ctypes.c_int * n.value)()
    _call("nvrtcGetSupportedArchs", numbers)
    return tuple(sorted(numbers))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    """The program's ProgramLog, CUBIN or PTX."""
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _strings(texts: Sequence[str | bytes]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def compile_module(module: Module, arch: int, extra: Sequence[str] = ()) -> tuple[bytes, str]:
    """(machine code for sm_<arch>, compiler's log). An arch newer than the library: PTX, which the driver compiles.

    extra: further options. CQError with the log's first line if the source does not compile.
    """
    headers = sorted(SOURCES.glob("*.cuh"))
    known = [known for known in architectures() if known <= arch]
    if not known:
        raise CQError(
            f"--cuda: NVRTC {version()[0]}.{version()[1]} does not compile for compute capability {arch / 10}"
        )
    target = f"sm_{arch}" if arch in known else f"compute_{known[-1]}"
    program = ctypes.c_void_p()
    source, names = (SOURCES / module.source).read_bytes(), _strings([path.name for path in headers])
    contents = _strings([path.read_bytes() for path in headers])
    _call("nvrtcCreateProgram", ctypes.byref(program), source, module.source.encode(), len(headers), contents, names)
    try:
        defines = [f"-D{name}={value}" for name, value in module.defines]
        options = [f"--gpu-architecture={target}", *OPTIONS, *defines, *extra]
        status = _library().nvrtcCompileProgram(program, len(options), _strings(options))
        log = _text(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CQError(f"--cuda: {module.source} does not compile for {target}: {log.strip().splitlines()[0]}")
        return _text(program, "CUBIN" if target.startswith("sm_") else "PTX"), log
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def cache_folder() -> Path:
    """Where compiled modules are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codequant-gguf" / "cuda"


def compiled(module: Module, arch: int) -> Path:
    """The module's machine code as a file: from the cache, by a hash of all that decides it, or compiled now."""
    texts = [path.read_bytes() for path in (SOURCES / module.source, *sorted(SOURCES.glob("*.cuh")))]
    key = repr((arch, version(), module, OPTIONS, texts)).encode()
    path = cache_folder() / f"{Path(module.source).stem}-sm{arch}-{hashlib.sha256(key).hexdigest()[:20]}.bin"
    if path.is_file():
        return path
    code, _ = compile_module(module, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _write(path, code)
    except OSError:  # a home that cannot be written to: compiled again next time
        return _write(Path(tempfile.mkdtemp(prefix="codequant-")) / path.name, code)


def _write(path: Path, code: bytes) -> Path:
    """Under another name first: two processes may compile the same module."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(code)
    partial.replace(path)
    return path

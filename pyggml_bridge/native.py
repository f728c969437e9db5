"""The native library. The only file that touches cffi: everything else sees NumPy arrays and these names."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge._native import ffi, lib
from pyggml_bridge.errors import CQError

__all__ = [
    "aligned_empty", "available_isas", "choose_isa", "current_isa", "ffi", "isa_help", "known_isas",
    "lib", "pointer",
]  # fmt: skip


def pointer(array: NDArray[Any] | None, ctype: str) -> Any:
    """C pointer to a C-contiguous array's data (None: NULL). The caller keeps the array alive."""
    if array is None:
        return ffi.NULL
    if not array.flags.c_contiguous:
        raise ValueError("array is not contiguous")
    return ffi.cast(ctype, array.ctypes.data)


def aligned_empty(n_bytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Uninitialised uint8 [n_bytes] starting at a multiple of `alignment`."""
    raw = np.empty(n_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + n_bytes]


def available_isas() -> list[str]:
    """Instruction sets that this host supports, best first."""
    return _names(lib.cq_isa_name)


def known_isas() -> list[str]:
    """Instruction sets that --isa knows, best first; some are another architecture's."""
    return _names(lib.cq_isa_known)


def _names(name_at: Any) -> list[str]:
    """What a function of an index returns until it returns NULL."""
    names: list[str] = []
    while (name := name_at(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


def isa_help() -> str:
    """What --help says of --isa."""
    return f"{', '.join(reversed(known_isas()))}: only lowers"


def current_isa() -> str:
    """The instruction set in use; CQError if the environment's CQ_ISA is unknown."""
    if lib.cq_isa_current() == ffi.NULL:
        choose_isa(None)
    return ffi.string(lib.cq_isa_current()).decode()


def choose_isa(name: str | None) -> None:
    """Use this instruction set from now on (None: the best); CQError if it is unknown or this host lacks it."""
    status = lib.cq_isa_choose(ffi.NULL if name is None else name.encode())
    if status == lib.CQ_ERR_UNSUPPORTED:
        raise CQError(f"--isa {name}: this machine supports {', '.join(available_isas())}")
    if status != lib.CQ_OK:
        shown = f"--isa {name}" if name is not None else f"CQ_ISA={os.environ.get('CQ_ISA')}"
        raise CQError(f"{shown}: unknown; this machine supports {', '.join(available_isas())}")

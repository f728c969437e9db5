"""The output file: streamed tensor by tensor, in the order that was planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import register
from pyggml_bridge.output import check_writable

from .plan import Part, PlannedTensor

METADATA_SLACK = 64 << 20  # room for tokenizer and alignment when free disk is checked


def check_output(out: Path, overwrite: bool, nbytes: int) -> None:
    """CQError unless a file of nbytes can be written to `out`; called before the long work."""
    check_writable(out, overwrite=overwrite)
    require_free(out.parent, nbytes)


def require_free(folder: Path, nbytes: int) -> None:
    """CQError unless the folder's disk has room for so many bytes of tensors."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + METADATA_SLACK:
        raise CQError(f"{folder}: {free / 1e9:.2f} GB free, {(nbytes + METADATA_SLACK) / 1e9:.2f} GB needed")


class OutputFile:
    """A GGUF file being written, tensor by tensor in the order of the plan."""

    def __init__(self, path: Path, architecture: str, keys: dict[str, Any], tensors: list[PlannedTensor]) -> None:
        """Open `path` and write header, keys and tensor table."""
        register()
        self.path = path
        self._writer = GGUFWriter(path, architecture)
        for key, value in keys.items():
            self._add_key(key, value)
        self._pending: list[Part] = [part for tensor in tensors for part in tensor.parts()]
        for part in self._pending:
            dtype = np.dtype(part.dtype)
            self._writer.add_tensor_info(part.name, part.shape, dtype, part.nbytes, part.ggml_type)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._pending.reverse()

    def _add_key(self, key: str, value: object) -> None:
        add = {bool: "bool", str: "string", float: "float32", list: "array"}
        if isinstance(value, int) and not isinstance(value, bool):
            (self._writer.add_uint32 if value >= 0 else self._writer.add_int32)(key, value)
        else:
            getattr(self._writer, f"add_{add[type(value)]}")(key, value)

    def write(self, planned: PlannedTensor, arrays: list[NDArray[Any]]) -> None:
        """Write the next weight, its parts in the plan's order; ValueError if it is not what was planned."""
        for expected, array in zip(planned.parts(), arrays, strict=True):
            part = self._pending.pop()
            if part != expected or part.shape != array.shape or np.dtype(part.dtype) != array.dtype:
                raise ValueError(f"{expected.name}: {array.dtype} {array.shape} where {part} was planned")
            self._writer.write_tensor_data(np.ascontiguousarray(array))

    def close(self) -> None:
        """Flush; ValueError if a planned tensor was not written."""
        if self._pending:
            raise ValueError(f"{self._pending[-1].name} was not written")
        self._writer.close()

    def abandon(self) -> None:
        """Close without any check."""
        self._writer.close()

"""The output file: streamed tensor by tensor, in the order that was planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import register
from pyggml_bridge.output import check_writable

from ..quantize.plan import PlannedTensor

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

    def __init__(
        self, path: Path, architecture: str, keys: dict[str, Any], tensors: list[PlannedTensor], n_written: int = 0
    ) -> None:
        """Open `path`, which holds this header and so many tensors, or nothing yet; CQError if it does not."""
        register()
        header = _header(path.with_name(path.name + ".header"), architecture, keys, tensors)
        written = [part for tensor in tensors[:n_written] for part in tensor.parts()]
        self._pending = [part for tensor in reversed(tensors[n_written:]) for part in reversed(tensor.parts())]
        self._file = path.open("r+b" if n_written else "w+b")
        if not n_written:
            self._file.write(header)
            return
        size = len(header) + sum(_padded(part.nbytes) for part in written)
        if self._file.read(len(header)) != header or path.stat().st_size < size:
            raise CQError(f"{path}: is not what was written before: start again without --resume")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, planned: PlannedTensor, arrays: list[NDArray[Any]]) -> None:
        """Write the next weight, its parts in the plan's order; ValueError if it is not what was planned."""
        for expected, array in zip(planned.parts(), arrays, strict=True):
            part = self._pending.pop()
            if part != expected or part.shape != array.shape or np.dtype(part.dtype) != array.dtype:
                raise ValueError(f"{expected.name}: {array.dtype} {array.shape} where {part} was planned")
            self._file.write(np.ascontiguousarray(array).data)
            self._file.write(bytes(_padded(part.nbytes) - part.nbytes))

    def flush(self) -> None:
        """Hand everything to the operating system, so that it outlives this process."""
        self._file.flush()

    def close(self) -> None:
        """Finish; ValueError if a planned tensor was not written."""
        if self._pending:
            raise ValueError(f"{self._pending[-1].name} was not written")
        self._file.close()

    def abandon(self) -> None:
        """Close without any check."""
        self._file.close()


def _padded(nbytes: int) -> int:
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _header(path: Path, architecture: str, keys: dict[str, Any], tensors: list[PlannedTensor]) -> bytes:
    """The file up to its first tensor, made in a file at `path`."""
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add_key(writer, key, value)
    for part in (part for tensor in tensors for part in tensor.parts()):
        writer.add_tensor_info(part.name, part.shape, np.dtype(part.dtype), part.nbytes, part.ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
    path.unlink()
    return header.ljust(_padded(len(header)), b"\0")


def _add_key(writer: GGUFWriter, key: str, value: object) -> None:
    add = {bool: "bool", str: "string", float: "float32", list: "array"}
    if isinstance(value, int) and not isinstance(value, bool):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    else:
        getattr(writer, f"add_{add[type(value)]}")(key, value)

"""The output file: streamed tensor by tensor, in the order that was planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import FileTensor, Keys, add_keys
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
        self, path: Path, architecture: str, keys: Keys, tensors: list[PlannedTensor], n_written: int = 0
    ) -> None:
        """Open `path`, which holds this header and so many tensors, or nothing yet; CQError if it does not."""
        header = _header(path.with_name(path.name + ".header"), architecture, keys, tensors)
        written = _file_tensors(tensors[:n_written])
        self._pending = _file_tensors(tensors[n_written:])[::-1]
        self._file = path.open("r+b" if n_written else "w+b")
        if not n_written:
            self._file.write(header)
            return
        size = len(header) + sum(_padded(tensor.nbytes) for tensor in written)
        if self._file.read(len(header)) != header or path.stat().st_size < size:
            raise CQError(f"{path}: is not what was written before: start again without --resume")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, planned: PlannedTensor, arrays: list[NDArray[Any]]) -> None:
        """Write the next weight, its tensors in the plan's order; ValueError if it is not what was planned."""
        for expected, array in zip(planned.file_tensors(), arrays, strict=True):
            tensor = self._pending.pop()
            if tensor != expected or tensor.shape != array.shape or np.dtype(tensor.dtype) != array.dtype:
                raise ValueError(f"{expected.name}: {array.dtype} {array.shape} where {tensor} was planned")
            self._file.write(np.ascontiguousarray(array).data)
            self._file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))

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


def _file_tensors(planned: list[PlannedTensor]) -> list[FileTensor]:
    return [tensor for weight in planned for tensor in weight.file_tensors()]


def _padded(nbytes: int) -> int:
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _header(path: Path, architecture: str, keys: Keys, tensors: list[PlannedTensor]) -> bytes:
    """The file up to its first tensor, made in a file at `path`."""
    writer = GGUFWriter(path, architecture)
    add_keys(writer, architecture, keys)
    for tensor in _file_tensors(tensors):
        tensor.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
    path.unlink()
    return header.ljust(_padded(len(header)), b"\0")

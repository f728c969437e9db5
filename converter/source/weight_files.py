"""Where a checkpoint's tensors lie: safetensors files or a GGUF file, read one tensor at a time.

What is read is copied into torch's own memory: sums over floats that start anywhere else may differ in their last bits
from one process to the next (docs/decisions/conversion.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyggml_bridge.errors import CQError


class Source(Protocol):
    """Named tensors on disk."""

    path: Path
    files: list[Path]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None if there is none of this name."""

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """The tensor, or one entry along its first axis, as float32; CQError if it cannot be read."""


class SafetensorsSource:
    """The safetensors files of a directory, with or without an index.

    A file is mapped only while a tensor is read: pages that stayed mapped would count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        """Read every file's header; CQError for a missing, truncated or foreign one."""
        self.path = path
        self.files = self._file_names()
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            with _opened(file) as tensors:
                names = list(tensors.keys())
                self._file_of |= dict.fromkeys(names, file)
                self._shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}

    def _file_names(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CQError(f"{index}: not a safetensors index") from error
            files = [self.path / name for name in sorted(names)]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CQError(f"{self.path}: no safetensors files")
        for file in files:
            if not file.is_file():
                raise CQError(f"{file}: missing, though the index names it")
        return files

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None if there is none of this name."""
        return self._shapes.get(name)

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """The tensor, or one entry along its first axis, as float32; CQError if it is not a float tensor."""
        with _opened(self._file_of[name]) as tensors:
            tensor = tensors.get_tensor(name) if entry is None else tensors.get_slice(name)[entry]
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise CQError(f"{self.path}: tensor {name} is {tensor.dtype}: only float checkpoints can be converted")
        return tensor.to(torch.float32, copy=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CQError(f"{path}: not a readable safetensors file ({error})") from error


class GgufSource:
    """A GGUF file whose types gguf-py can dequantize."""

    def __init__(self, path: Path) -> None:
        """Map the file; CQError if it is not a GGUF file."""
        self.path, self.files = path, [path]
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeError) as error:
            raise CQError(f"{path}: not a readable GGUF file ({error})") from error
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor in torch's order, None if there is none of this name."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape)) if name in self._tensors else None

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """The tensor, or one entry along its first axis, as float32; CQError for a type without dequantization."""
        tensor = self._tensors[name]
        rows = slice(None) if entry is None else slice(entry, entry + 1)
        try:
            values = dequantize(tensor.data[rows], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CQError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which cannot be read"
            ) from error
        shape = self.shape(name) or ()
        return torch.tensor(values, dtype=torch.float32).reshape(shape if entry is None else shape[1:])

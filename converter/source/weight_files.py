"""Where a checkpoint's tensors lie: safetensors files or a GGUF file, read one tensor at a time.

What is read is copied into torch's own memory: sums over floats that start anywhere else may differ in their last bits
from one process to the next (docs/decisions/conversion.md).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import LFS_POINTER, foreign, is_lfs_pointer, split_message

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PREFIX = "model."  # transformers' base_model_prefix of all architectures here
ROWS_AT_ONCE = 4096  # of two tensors that are compared


class Source(Protocol):
    """Named tensors on disk."""

    path: Path
    files: list[Path]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None if there is none of this name."""

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """The tensor, or one entry along its first axis, as float32; CQError if it cannot be read."""

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values."""

    def others(self, names: set[str]) -> list[str]:
        """The tensors that have none of these names, sorted."""


class SafetensorsSource:
    """The safetensors files of a directory, those that transformers reads.

    A file is mapped only while a tensor is read: pages that stayed mapped would count as this process's memory.
    """

    def __init__(self, path: Path, chosen: str | None = None) -> None:
        """Read every file's header; CQError for a missing, truncated or foreign one, or a tensor that two files hold.

        chosen: the file of weights, or the index, that the configuration names (its field transformers_weights).
        """
        self.path = path
        self.files = weight_files(path, chosen)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in self._file_of:
                        raise CQError(f"{self.path}: tensor {name} is in {self._file_of[name].name} and {file.name}")
                    self._file_of[name] = file
                    self._shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def _stored_name(self, name: str) -> str | None:
        """The name as these files spell it, None if there is no such tensor; CQError if there are two.

        As transformers does, a prefix "model." may be missing or be there once more.
        """
        found = [each for each in (name, name.removeprefix(PREFIX), PREFIX + name) if each in self._file_of]
        if len(set(found)) > 1:
            raise CQError(f"{self.path}: tensors {found[0]} and {found[1]} are the same one")
        return found[0] if found else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None if there is none of this name; CQError if there are two."""
        stored = self._stored_name(name)
        return None if stored is None else self._shapes[stored]

    def read(self, name: str, entry: int | None = None) -> Tensor:
        """The tensor, or one entry along its first axis, as float32; CQError if it is not a float tensor."""
        tensor = self._part(name, slice(None) if entry is None else entry)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise CQError(f"{self.path}: tensor {name} is {tensor.dtype}: only float checkpoints can be converted")
        return tensor.to(torch.float32, copy=True)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values, compared a few rows at a time."""
        shape = self.shape(first)
        if shape is None or shape != self.shape(second):
            return False
        blocks = (slice(start, start + ROWS_AT_ONCE) for start in range(0, shape[0], ROWS_AT_ONCE))
        return all(torch.equal(self._part(first, rows).float(), self._part(second, rows).float()) for rows in blocks)

    def others(self, names: set[str]) -> list[str]:
        """The tensors that have none of these names, however spelled, sorted."""
        named = {self._stored_name(name) for name in names}
        return sorted(name for name in self._file_of if name not in named)

    def _part(self, name: str, index: slice | int) -> Tensor:
        stored = self._stored_name(name)
        if stored is None:
            raise CQError(f"{self.path}: tensor {name} is missing")
        with _opened(self._file_of[stored]) as tensors:
            if index == slice(None):
                whole: Tensor = tensors.get_tensor(stored)
                return whole
            part: Tensor = tensors.get_slice(stored)[index]
            return part


def weight_files(path: Path, chosen: str | None = None) -> list[Path]:
    """The files that transformers takes a directory's weights from, in its order; CQError if it has none of these.

    First model.safetensors, then model.safetensors.index.json with the files that it names. All else is left alone,
    whatever its name ends in. chosen: see SafetensorsSource.
    """
    if chosen is not None:
        if not isinstance(chosen, str) or not chosen.endswith((".safetensors", INDEX[len("model") :])):
            raise CQError(
                f"{path / 'config.json'}: transformers_weights is {chosen!r}, which names no safetensors file"
            )
        file = _inside(path, chosen, path / "config.json")
        return _indexed_files(path, file) if chosen.endswith(".json") else [file]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return _indexed_files(path, path / INDEX)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            raise CQError(f"{path / name}: weights in PyTorch's format are not read, only safetensors")
    others = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("."))
    beside = f" (there is {', '.join(others[:3])}{' and more' * (len(others) > 3)})" if others else ""
    raise CQError(f"{path}: neither {WEIGHTS} nor {INDEX}{beside}")


def _indexed_files(path: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CQError(f"{index}: not a safetensors index (no weight_map)")
    names = list(weight_map.values())
    if not all(isinstance(name, str) for name in names):
        raise CQError(f"{index}: not a safetensors index (weight_map must have names of files)")
    return [_inside(path, name, index) for name in sorted(set(names))]


def _inside(path: Path, name: str, where: Path) -> Path:
    """The file of a directory that another of its files names; a symbolic link may lead anywhere."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CQError(f"{where}: names {name!r}, which is not inside the directory")
    file = path / name
    if not file.is_file():
        raise CQError(f"{file}: missing, though {where.name} names it")
    return file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose outermost value is an object; CQError saying what the file is instead."""
    data = path.read_bytes()
    if is_lfs_pointer(data):
        raise CQError(f"{path}: {foreign(data)}")
    if data.startswith(codecs.BOM_UTF8):
        raise CQError(f"{path}: begins with a byte order mark, which JSON does not allow")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CQError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(document, dict):
        raise CQError(f"{path}: holds {type(document).__name__}, expected an object ({{...}})")
    return document


def refuse_pointers(path: Path) -> None:
    """CQError if a file that describes the model or its tokenizer is a Git LFS pointer."""
    names = [*DESCRIPTIONS, *([] if (path / "tokenizer.json").is_file() else ["tokenizer.model"])]
    for file in (path / name for name in names):
        if file.is_file():
            with file.open("rb") as opened:
                head = opened.read(len(LFS_POINTER))
            if is_lfs_pointer(head):
                raise CQError(f"{file}: {foreign(head)}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CQError(f"{path}: {_unreadable(path, error)}") from error


def _unreadable(path: Path, error: Exception) -> str:
    with suppress(OSError), path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
        if is_lfs_pointer(head):
            return str(foreign(head))
    return f"not a readable safetensors file ({error})"


class GgufSource:
    """A GGUF file whose types gguf-py can dequantize."""

    def __init__(self, path: Path) -> None:
        """Map the file; CQError if it is not a GGUF file."""
        self.path, self.files = path, [path]
        with path.open("rb") as file:
            if message := foreign(file.read(48)):
                raise CQError(f"{path}: {message}")
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeError) as error:
            raise CQError(f"{path}: not a readable GGUF file ({error})") from error
        if message := split_message(self.value("split.count")):
            raise CQError(f"{path}: {message}")
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def value(self, key: str) -> Any:
        """Value of a key, None if there is none."""
        field = self.reader.get_field(key)
        return field.contents() if field else None

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

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values."""
        return self.shape(first) == self.shape(second) and torch.equal(self.read(first), self.read(second))

    def others(self, names: set[str]) -> list[str]:
        """The tensors that have none of these names, sorted."""
        return sorted(name for name in self._tensors if name not in names)

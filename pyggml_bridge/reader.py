"""GGUF file -> metadata and checked tensor views over a memory map.

gguf-py's GGUFReader trusts what it reads and builds an array object per string; this reader checks every count, length,
offset, type and shape before using it, and leaves the strings of a vocabulary undecoded until someone asks for them.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from pyggml_bridge import format as cq_format
from pyggml_bridge.errors import CQError

cq_format.register()

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_DIMS = 4
MAX_NAME = 64 * 1024
MIN_KV_BYTES = 8 + 1 + 4 + 1  # the smallest entry: a key of one byte and a value of one byte
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

Metadata: TypeAlias = dict[str, Any]  # a file's keys: numbers, texts, and lists or StringArrays of them

_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Tensor:
    """A tensor in the map. shape: outermost first, like NumPy. data: its bytes, uint8 [nbytes], read-only."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


class StringArray(Sequence[str]):
    """An array of strings in the map, decoded when read; CQError then if one is not UTF-8.

    A tokenizer has hundreds of thousands, which a file with tokenizer.huggingface.json never needs.
    """

    def __init__(self, path: Path, data: mmap.mmap, starts: list[int]) -> None:
        """starts: where each string begins, its length first, and where the last one ends."""
        self._path, self._data, self._starts = path, data, starts

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        """One string, or a list of them."""
        at = range(len(self))[index]
        return self._decode(at) if isinstance(at, int) else [self._decode(i) for i in at]

    def __repr__(self) -> str:
        """For error messages, so without decoding."""
        return f"an array of {len(self)} strings"

    def _decode(self, at: int) -> str:
        start = self._starts[at]
        try:
            return self._data[start + _U64.size : self._starts[at + 1]].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CQError(f"{self._path}: damaged string near byte {start}: {error}") from error

    def __eq__(self, other: object) -> bool:
        """As a list of the strings."""
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes is what Git LFS leaves in place of one that was not fetched."""
    return head.startswith(LFS_POINTER)


def foreign(head: bytes) -> str | None:
    """What a file that begins with these bytes (48 suffice) is instead of a little-endian GGUF file, or None."""
    if is_lfs_pointer(head):
        return "a Git LFS pointer, not the file itself ('git lfs pull' fetches it)"
    if head[:4] != MAGIC:
        return "not a GGUF file"
    if len(head) >= 8 and int.from_bytes(head[4:8], "big") in VERSIONS:
        return "a big-endian GGUF file, only little-endian ones are read (gguf-py's gguf-convert-endian converts it)"
    return None


def split_message(count: object) -> str | None:
    """What is wrong with a file whose key split.count has this value (None: no such key), None if nothing."""
    if count is None or (isinstance(count, int) and 0 <= count <= 1):
        return None
    return f"one of {count} parts of a split GGUF file: join them (llama-gguf-split --merge FIRST_PART OUT)"


class GGUFFile:
    """An open GGUF file. metadata: key -> int, float, bool, str, list of these or StringArray. tensors: name -> Tensor.

    Raises CQError naming the file for anything truncated, inconsistent or of an unknown version or type.
    """

    def __init__(self, path: str | Path) -> None:
        """Map the file and parse its header."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise CQError(f"{self.path}: not a GGUF file: only {self.size} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CQError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from error
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._offset = 0
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise CQError(f"{self.path}: damaged header near byte {self._offset}: {error}") from error

    # ---- primitives: each checks that its bytes exist, then advances ----

    def _take(self, n: int) -> int:
        start = self._offset
        if n > self.size - start:
            raise ValueError(f"{n} bytes expected, {self.size - start} left")
        self._offset = start + n
        return start

    def _scalar(self, kind: struct.Struct) -> Any:
        return kind.unpack_from(self._map, self._take(kind.size))[0]

    def _string(self, limit: int | None = None) -> str:
        length = self._scalar(_U64)
        if limit is not None and length > limit:
            raise ValueError(f"a name of {length} bytes")
        start = self._take(length)
        return self._map[start : start + length].decode("utf-8")

    def _strings(self, count: int) -> StringArray:
        """`count` strings, walked in one loop: with a call per string that took half of a start's time."""
        data, size, length_at, prefix = self._map, self.size, _U64.unpack_from, _U64.size
        start = self._offset
        starts = [start]
        for _ in range(count):
            self._offset = start
            start += prefix + length_at(data, start)[0]
            if start > size:
                raise ValueError(f"a string up to byte {start}, the file ends at {size}")
            starts.append(start)
        self._offset = start
        return StringArray(self.path, data, starts)

    # ---- header ----

    def _parse(self) -> None:
        if message := foreign(self._map[:48]):
            raise CQError(f"{self.path}: {message}")
        self._take(4)
        version = self._scalar(_U32)
        if version not in VERSIONS:
            raise CQError(f"{self.path}: GGUF version {version} is not supported (only {VERSIONS})")
        n_tensors, n_keys = self._scalar(_U64), self._scalar(_U64)
        if n_keys > self.size // MIN_KV_BYTES or n_tensors > self.size // MIN_TENSOR_BYTES:
            raise ValueError(f"{n_tensors} tensors and {n_keys} keys do not fit {self.size} bytes")
        self.metadata: Metadata = {}
        self.types: dict[str, tuple[GGUFValueType, GGUFValueType | None]] = {}  # value type, item type of arrays
        for _ in range(n_keys):
            key = self._string(MAX_NAME)
            if key in self.metadata:
                raise ValueError(f"key {key!r} appears twice")
            kind = GGUFValueType(self._scalar(_U32))
            item = GGUFValueType(self._scalar(_U32)) if kind is GGUFValueType.ARRAY else None
            self.types[key] = kind, item
            self.metadata[key] = self._value(kind) if item is None else self._array(item)
        if message := split_message(self.metadata.get("split.count")):
            raise CQError(f"{self.path}: {message}")
        infos = [self._tensor_info() for _ in range(n_tensors)]
        self._map_tensors(infos)

    def _value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        return self._scalar(_SCALARS[kind])

    def _array(self, item: GGUFValueType) -> Sequence[Any]:
        count = self._scalar(_U64)
        if item is GGUFValueType.ARRAY:
            raise ValueError("arrays of arrays are not supported")
        if item is GGUFValueType.STRING:
            if count > (self.size - self._offset) // _U64.size:
                raise ValueError(f"an array of {count} strings does not fit")
            return self._strings(count)
        size = _SCALARS[item].size
        start = self._take(count * size)
        values: list[Any] = np.frombuffer(self._map, _SCALARS[item].format, count, start).tolist()
        return values

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string(MAX_NAME)
        n_dims = self._scalar(_U32)
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        dims = [self._scalar(_U64) for _ in range(n_dims)]
        kind = self._scalar(_U32)
        if kind not in GGMLQuantizationType._value2member_map_:
            raise CQError(f"{self.path}: tensor {name!r} has the unknown type {kind}")
        return name, GGMLQuantizationType(kind), tuple(reversed(dims)), self._scalar(_U64)

    def _map_tensors(self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-self._offset // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, kind, shape, offset in infos:
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} appears twice")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block or min(shape) < 1:
                raise ValueError(f"tensor {name!r} of type {kind.name} has shape {shape}")
            nbytes = math.prod(shape) // block * block_bytes
            if offset % alignment or base + offset + nbytes > self.size:
                raise ValueError(f"tensor {name!r} ({nbytes} bytes at {offset}) lies outside the file")
            spans.append((base + offset, base + offset + nbytes, name))
            self.tensors[name] = Tensor(name, kind, shape, self._bytes[base + offset : base + offset + nbytes])
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise ValueError(f"tensors {first!r} and {second!r} overlap")

    # ---- typed access ----

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """metadata[key] as `kind` (int, float, str, ...); CQError if absent without default or of another type."""
        if key not in self.metadata:
            if default is ...:
                raise CQError(f"{self.path}: the key {key} is missing")
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CQError(f"{self.path}: the key {key} is {value!r:.40}, expected {kind.__name__}")
        return value

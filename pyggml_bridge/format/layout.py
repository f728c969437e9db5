"""What stands in the file for one weight: the tensor itself and, beside one of a CQ type, ordinary tensors.

A weight `blk.0.attn_q.weight` of type CQ5, CQ4, CQ3, CQ2, CQ4T, CQ3T or CQ2T holds packed indices only. Beside it lie

    blk.0.attn_q.centroids     I8   [..., rows / codebook_rows, n_codebooks * n_centroids]   -127 .. 127
    blk.0.attn_q.scales        F32  [..., rows]                          finite, >= 0
    blk.0.attn_q.group_scales  I8   [..., rows, n_groups]                0 .. 127, only where the file uses them
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from math import prod

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from pyggml_bridge.format.tensor_types import CQType, TensorType, register

EMBEDDINGS_AND_HEAD = ("token_embd.weight", "output.weight", "output.bias")  # what bits per weight leave out
_F32, _I8, _I32 = GGMLQuantizationType.F32, GGMLQuantizationType.I8, GGMLQuantizationType.I32
_DTYPES: dict[GGMLQuantizationType, type[np.generic]] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I32: np.int32,
}

register()  # FileTensor has the CQ types among ggml's


@dataclass(frozen=True)
class Grouping:
    """Columns that share a codebook and a scale: multiples of 64, or -1 for the whole row (and no group scales).

    codebook_rows: rows that share their codebooks, 1, 2, 4 or 8.
    """

    group_size: int = -1
    scale_group: int = 64
    codebook_rows: int = 1

    def codebook_cols(self, cols: int) -> int:
        """Columns that share a codebook in a row of `cols`."""
        return cols if self.group_size == -1 else min(cols, self.group_size)

    def scale_cols(self, cols: int) -> int:
        """Columns that share a group scale in a row of `cols`; 0: there are no group scales."""
        return 0 if self.scale_group == -1 else min(cols, self.scale_group)


@dataclass(frozen=True)
class Companions:
    """Names of the tensors beside a clustered weight. experts: also beside other parts of a weight cut by type."""

    centroids: str
    scales: str
    group_scales: str
    experts: str

    @classmethod
    def of(cls, weight: str) -> Companions:
        """`blk.0.attn_q.weight` -> `blk.0.attn_q.{centroids,scales,group_scales,experts}`."""
        stem = weight.removesuffix(".weight")
        return cls(*(f"{stem}.{field.name}" for field in fields(cls)))


def section_name(weight: str, index: int) -> str:
    """The index-th part of a weight whose experts have several types: `S.weight`, `S.1.weight`, `S.2.weight`, ..."""
    return weight if index == 0 else f"{weight.removesuffix('.weight')}.{index}.weight"


def is_later_section(weight: str) -> bool:
    """Whether this is the name of a part of a weight, other than the first."""
    return re.search(r"\.\d+\.weight$", weight) is not None


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file: the shape and dtype of its array. Types that are stored in blocks are bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    type: GGMLQuantizationType

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], kind: TensorType) -> FileTensor:
        """`shape` elements in this type; ValueError if its blocks do not divide a row."""
        ggml = GGMLQuantizationType(kind)
        if ggml in _DTYPES:
            return cls(name, tuple(shape), _DTYPES[ggml], ggml)
        return cls(name, tuple(quant_shape_to_byte_shape(shape, ggml)), np.uint8, ggml)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def announce(self, writer: GGUFWriter) -> None:
        """Add name, shape and type to the header that is to be written."""
        writer.add_tensor_info(self.name, self.shape, np.dtype(self.dtype), self.nbytes, raw_dtype=self.type)


def weight_tensors(
    name: str, shape: tuple[int, ...], kind: TensorType, grouping: Grouping, *, is_section: bool = False
) -> list[FileTensor]:
    """The tensors of a weight [..., cols]: itself, then centroids, scales and group scales if it has a CQ type.

    is_section: the weight is a part [experts of this part, rows, cols] of a weight whose experts have several types,
    and the list of its experts comes last.
    """
    tensors, names = [FileTensor.of(name, shape, kind)], Companions.of(name)
    if isinstance(kind, CQType):
        *lead, rows, cols = shape
        codebook_cols, scale_cols = grouping.codebook_cols(cols), grouping.scale_cols(cols)
        books = (*lead, -(-rows // grouping.codebook_rows), -(-cols // codebook_cols) * kind.n_centroids)
        tensors.append(FileTensor.of(names.centroids, books, _I8))
        tensors.append(FileTensor.of(names.scales, (*lead, rows), _F32))
        if scale_cols:
            tensors.append(FileTensor.of(names.group_scales, (*lead, rows, -(-cols // scale_cols)), _I8))
    if is_section:
        tensors.append(FileTensor.of(names.experts, shape[:1], _I32))
    return tensors

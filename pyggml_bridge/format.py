"""The CQ tensor types: ids, sizes, tensor names, and the NumPy oracle for their bytes (docs/format.md).

A weight `blk.0.attn_q.weight` of type CQ5, CQ4, CQ3, CQ2, CQ4T, CQ3T or CQ2T holds packed indices only. Beside it lie
ordinary tensors:

    blk.0.attn_q.centroids     I8   [..., rows / codebook_rows, n_codebooks * n_centroids]   -127 .. 127
    blk.0.attn_q.scales        F32  [..., rows]                          finite, >= 0
    blk.0.attn_q.group_scales  I8   [..., rows, n_groups]                0 .. 127, only where the file uses them

The effective weight is an int8 times the row's scale, so that a kernel's whole inner loop is integer:

    W8 = centroid                                   without group scales
    W8 = (centroid * group_scale + 64) >> 7         with them
    W  = W8 * scale
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

VERSION = 2
BLOCK = 64
CODEBOOK_ROWS = (1, 2, 4, 8)  # how many rows may share codebooks: clustering takes eight side by side
FILE_TYPES = {  # general.file_type of files of one stock type
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
MAX_COLS = 65536  # the int32 accumulator's bound, see native/src/kernels.h


class CQType(IntEnum):
    """GGUF tensor type ids of the clustered types, far from any in use elsewhere.

    Those with T have a trellis: an index has one bit more than is stored, which follows from the rows above.
    """

    CQ2 = 17202
    CQ3 = 17203
    CQ4 = 17204
    CQ5 = 17205
    CQ2T = 17212
    CQ3T = 17213
    CQ4T = 17214

    @property
    def trellis(self) -> bool:
        """Whether the rows above take part in an index."""
        return self >= 17210

    @property
    def bits(self) -> int:
        """Bits per weight of the packed indices."""
        return self - (17210 if self.trellis else 17200)

    @property
    def n_centroids(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits + self.trellis

    @property
    def block_bytes(self) -> int:
        """Bytes of a packed block of 64 indices."""
        return BLOCK * self.bits // 8


def register() -> None:
    """Teach gguf-py the CQ types (idempotent): its reader and writer then handle our files like any other."""
    members, values = GGMLQuantizationType._member_map_, GGMLQuantizationType._value2member_map_
    for cq in CQType:
        if cq.value in values:
            continue
        member = int.__new__(GGMLQuantizationType, cq.value)
        member._name_, member._value_ = cq.name, cq.value
        members[cq.name] = values[cq.value] = member
        GGMLQuantizationType._member_names_.append(cq.name)
        GGML_QUANT_SIZES[member] = (BLOCK, cq.block_bytes)


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


def packed_shape(shape: tuple[int, ...], cq: CQType) -> tuple[int, ...]:
    """Byte shape of packed indices of a [..., rows, cols] weight; ValueError unless cols is a multiple of 64."""
    if shape[-1] % BLOCK:
        raise ValueError(f"{cq.name} needs a multiple of {BLOCK} columns, not {shape[-1]}")
    return (*shape[:-1], shape[-1] // BLOCK * cq.block_bytes)


def pack(indices: NDArray[np.uint8], cq: CQType, codebook_rows: int = 1) -> NDArray[np.uint8]:
    """Indices [..., rows, cols] (0 .. n_centroids - 1) -> bytes [..., rows, cols / 64 * block_bytes].

    CQ4: byte j = index j | index j+32 << 4. CQ2: byte j holds indices j, j+16, j+32, j+48, lowest bits first.
    CQ3, CQ5: the lower bits of each index as CQ2 and CQ4, then 8 bytes with the high bits, bit j % 8 of byte j / 8.
    Types with T store, as the type without T does, the lowest bits of each index and above them a free bit u; the
    index has u ^ u of two rows above in that place, and above it u of the row above.
    ValueError if an index does not fit the type, or no choice of u gives the indices.
    """
    packed_shape(indices.shape, cq)
    if indices.size and int(indices.max()) >= cq.n_centroids:
        raise ValueError(f"index {int(indices.max())} does not fit {cq.name}")
    if not cq.trellis:
        return _pack_bits(indices, cq.bits)
    one, free_bit = np.uint8(1), np.uint8(1 << cq.bits - 1)
    free = _rows_above(indices >> one & free_bit, codebook_rows, -1)
    if ((indices & free_bit) != free ^ _rows_above(free, codebook_rows, 2)).any():
        raise ValueError(f"{cq.name}: the indices are not on the trellis")
    return _pack_bits(indices & free_bit - one | free, cq.bits)


def unpack(packed: NDArray[np.uint8], cq: CQType, codebook_rows: int = 1) -> NDArray[np.uint8]:
    """Inverse of pack: bytes [..., rows, n * block_bytes] -> indices [..., rows, n * 64]."""
    stored = _unpack_bits(packed, cq.bits)
    if not cq.trellis:
        return stored
    free = stored & np.uint8(1 << cq.bits - 1)
    return stored ^ _rows_above(free, codebook_rows, 2) | _rows_above(free, codebook_rows, 1) << np.uint8(1)


def _rows_above(values: NDArray[np.uint8], codebook_rows: int, up: int) -> NDArray[np.uint8]:
    """Of values [..., rows, cols]: each row's `up` rows above, around the ring of rows that share their codebooks."""
    out = np.empty_like(values)
    for first in range(0, values.shape[-2], codebook_rows):
        ring = values[..., first : first + codebook_rows, :]
        out[..., first : first + codebook_rows, :] = np.roll(ring, up, axis=-2)
    return out


def _pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[..., cols] of 2 to 5 bits -> blocks of 64: four or two bits side by side, then the plane of an odd bit."""
    block, even = values.reshape(-1, BLOCK), bits & ~1
    lanes = (block & (1 << even) - 1).reshape(-1, 8 // even, BLOCK * even // 8)
    parts = [np.bitwise_or.reduce([lanes[:, i] << i * even for i in range(8 // even)]).astype(np.uint8)]
    if bits != even:
        parts.append(np.packbits(block >> even, axis=1, bitorder="little"))
    return np.concatenate(parts, axis=1).reshape(*values.shape[:-1], values.shape[-1] * bits // 8)


def _unpack_bits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    block, even = packed.reshape(-1, BLOCK * bits // 8), bits & ~1
    low = block[:, : BLOCK * even // 8]
    out = np.concatenate([low >> shift & (1 << even) - 1 for shift in range(0, 8, even)], axis=1)
    if bits != even:
        out |= np.unpackbits(block[:, low.shape[1] :], axis=1, bitorder="little") << even
    return out.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


@dataclass(frozen=True)
class Clustered:
    """A clustered weight [..., rows, cols], as the file holds it.

    packed uint8 [..., rows, cols / 64 * block_bytes]; centroids int8 [..., rows / codebook_rows, n_codebooks *
    n_centroids]; scales float32 [..., rows]; group_scales int8 [..., rows, n_groups] or None. codebook_cols,
    scale_cols: columns that share a codebook or a group scale, multiples of 64; codebook_rows: rows that share
    codebooks, a power of two, and with a trellis its ring. The last of each may be shorter.
    """

    cq: CQType
    packed: NDArray[np.uint8]
    centroids: NDArray[np.int8]
    scales: NDArray[np.float32]
    group_scales: NDArray[np.int8] | None
    codebook_cols: int
    scale_cols: int
    codebook_rows: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] // self.cq.block_bytes * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, companions included."""
        groups = 0 if self.group_scales is None else self.group_scales.nbytes
        return self.packed.nbytes + self.centroids.nbytes + self.scales.nbytes + groups

    def weights_i8(self) -> NDArray[np.int8]:
        """Effective int8 weights [..., rows, cols]: what every kernel multiplies."""
        indices = unpack(self.packed, self.cq, self.codebook_rows)
        cols = indices.shape[-1]
        codebook = np.arange(cols) // self.codebook_cols * self.cq.n_centroids
        rows = np.repeat(self.centroids, self.codebook_rows, axis=-2)[..., : indices.shape[-2], :]
        w8 = np.take_along_axis(rows, indices.astype(np.int64) + codebook, axis=-1)
        if self.group_scales is None:
            return w8
        scales = self.group_scales[..., np.arange(cols) // self.scale_cols].astype(np.int32)
        return ((w8.astype(np.int32) * scales + 64) >> 7).astype(np.int8)

    def dequantize(self) -> NDArray[np.float32]:
        """Float weights [..., rows, cols]."""
        return self.weights_i8().astype(np.float32) * self.scales[..., None]


def hadamard(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Each block of columns of x [..., n] times the orthonormal Hadamard matrix of Sylvester, its own inverse.

    block: a power of two that divides n. In log2(block) steps of sums and differences, as the kernels do it: no BLAS,
    whose sums need not be the same twice.
    """
    columns = np.array(x.reshape(-1, block).T, np.float32, order="C")
    half = 1
    while half < block:
        low, high = columns.reshape(-1, 2, half, columns.shape[1]).swapaxes(0, 1)
        difference = low - high
        low += high
        high[:] = difference
        half *= 2
    return (columns.T * np.float32(1 / block**0.5)).reshape(x.shape)


def quantize_activations(x: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The run-time quantizer: x [tokens, cols] -> (q int8, scales float32 [tokens]), symmetric per token.

    scale = max|x| / (127 or 7); q = x * (1 / scale) rounded half to even, all in float32. A row of zeros has scale 0.
    """
    top = np.float32((1 << (bits - 1)) - 1)
    scales = (np.abs(x).max(axis=-1) / top).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.clip(np.rint(x * inverse[..., None]), -top, top).astype(np.int8)
    return q, scales

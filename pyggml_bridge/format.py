"""The CQ tensor types: ids, sizes, tensor names, and the NumPy oracle for their bytes (docs/format.md).

A weight `blk.0.attn_q.weight` of type CQ5, CQ4, CQ3 or CQ2 holds packed indices only. Beside it lie ordinary tensors:

    blk.0.attn_q.centroids     I8   [..., rows / codebook_rows, n_codebooks * 2**bits]   -127 .. 127
    blk.0.attn_q.scales        F32  [..., rows]                          finite, >= 0
    blk.0.attn_q.group_scales  I8   [..., rows, n_groups]                0 .. 127, only where the file uses them

The effective weight is an int8 times the row's scale, so that a kernel's whole inner loop is integer:

    W8 = centroid                                   without group scales
    W8 = (centroid * group_scale + 64) >> 7         with them
    W  = W8 * scale
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

VERSION = 1
BLOCK = 64
CODEBOOK_ROWS = (1, 2, 4, 8)  # how many rows may share codebooks: clustering takes eight side by side
MAX_COLS = 65536  # the int32 accumulator's bound, see native/src/kernels.h


class CQType(IntEnum):
    """GGUF tensor type ids of the clustered types, far from any in use elsewhere."""

    CQ2 = 17202
    CQ3 = 17203
    CQ4 = 17204
    CQ5 = 17205

    @property
    def bits(self) -> int:
        """Bits per index."""
        return self - 17200

    @property
    def plane_bits(self) -> int:
        """Bits per index in the first part of a block; an odd one's highest bit is in the second."""
        return self.bits & ~1

    @property
    def n_centroids(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits

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
class Sidecars:
    """Names of the tensors beside a clustered weight."""

    centroids: str
    scales: str
    group_scales: str

    @classmethod
    def of(cls, weight: str) -> Sidecars:
        """`blk.0.attn_q.weight` -> `blk.0.attn_q.{centroids,scales,group_scales}`."""
        stem = weight.removesuffix(".weight")
        return cls(f"{stem}.centroids", f"{stem}.scales", f"{stem}.group_scales")


def packed_shape(shape: tuple[int, ...], cq: CQType) -> tuple[int, ...]:
    """Byte shape of packed indices of a [..., rows, cols] weight; ValueError unless cols is a multiple of 64."""
    if shape[-1] % BLOCK:
        raise ValueError(f"{cq.name} needs a multiple of {BLOCK} columns, not {shape[-1]}")
    return (*shape[:-1], shape[-1] // BLOCK * cq.block_bytes)


def pack(indices: NDArray[np.uint8], cq: CQType) -> NDArray[np.uint8]:
    """Indices [..., cols] (0 .. 2**bits - 1) -> bytes [..., cols / 64 * block_bytes].

    CQ4: byte j = index j | index j+32 << 4. CQ2: byte j holds indices j, j+16, j+32, j+48, lowest bits first.
    CQ3, CQ5: the lower bits of each index as CQ2 and CQ4, then 8 bytes with the high bits, bit j % 8 of byte j / 8.
    """
    shape = packed_shape(indices.shape, cq)
    if indices.size and int(indices.max()) >= cq.n_centroids:
        raise ValueError(f"index {int(indices.max())} does not fit {cq.name}")
    block = indices.reshape(-1, BLOCK)
    per_byte = 8 // cq.plane_bits
    lanes = (block & (1 << cq.plane_bits) - 1).reshape(-1, per_byte, BLOCK // per_byte)
    packed = np.bitwise_or.reduce([lanes[:, i] << i * cq.plane_bits for i in range(per_byte)]).astype(np.uint8)
    if cq.bits != cq.plane_bits:
        high = np.packbits(block >> cq.plane_bits, axis=1, bitorder="little")
        packed = np.concatenate([packed, high], axis=1)
    return packed.reshape(shape)


def unpack(packed: NDArray[np.uint8], cq: CQType) -> NDArray[np.uint8]:
    """Inverse of pack: bytes [..., n * block_bytes] -> indices [..., n * 64]."""
    block = packed.reshape(-1, cq.block_bytes)
    low, mask = block[:, : BLOCK * cq.plane_bits // 8], (1 << cq.plane_bits) - 1
    out = np.concatenate([low >> shift & mask for shift in range(0, 8, cq.plane_bits)], axis=1)
    if cq.bits != cq.plane_bits:
        out |= np.unpackbits(block[:, low.shape[1] :], axis=1, bitorder="little") << cq.plane_bits
    return out.reshape(*packed.shape[:-1], packed.shape[-1] // cq.block_bytes * BLOCK)


@dataclass(frozen=True)
class Clustered:
    """A clustered weight [..., rows, cols], as the file holds it.

    packed uint8 [..., rows, cols / 64 * block_bytes]; centroids int8 [..., rows / codebook_rows, n_codebooks *
    n_centroids]; scales float32 [..., rows]; group_scales int8 [..., rows, n_groups] or None. codebook_cols,
    scale_cols: columns that share a codebook or a group scale, multiples of 64; codebook_rows: rows that share
    codebooks, a power of two. The last of each may be shorter.
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
        """Bytes in the file, sidecars included."""
        groups = 0 if self.group_scales is None else self.group_scales.nbytes
        return self.packed.nbytes + self.centroids.nbytes + self.scales.nbytes + groups

    def weights_i8(self) -> NDArray[np.int8]:
        """Effective int8 weights [..., rows, cols]: what every kernel multiplies."""
        indices = unpack(self.packed, self.cq)
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

    block: a power of two that divides n.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), matrix)
    return (x.reshape(-1, block) @ (matrix / np.float32(block**0.5))).reshape(x.shape)


def quantize_activations(x: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The run-time quantizer: x [tokens, cols] -> (q int8, scales float32 [tokens]), symmetric per token.

    scale = max|x| / (127 or 7); q = x * (1 / scale) rounded half to even, all in float32. A row of zeros has scale 0.
    """
    top = np.float32((1 << (bits - 1)) - 1)
    scales = (np.abs(x).max(axis=-1) / top).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.clip(np.rint(x * inverse[..., None]), -top, top).astype(np.int8)
    return q, scales

"""The NumPy oracle for the bytes of a clustered weight: packing of indices, and the weights they stand for.

The effective weight is an int8 times the row's scale, so that a kernel's whole inner loop is integer:

    W8 = centroid                                   without group scales
    W8 = (centroid * group_scale + 64) >> 7         with them
    W  = W8 * scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.format.tensor_types import BLOCK, CQType, packed_shape


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
    """Of values [..., rows, cols]: each row's `up` rows above; the last rows are above the first (tail-biting)."""
    out = np.empty_like(values)
    for first in range(0, values.shape[-2], codebook_rows):
        rows = values[..., first : first + codebook_rows, :]
        out[..., first : first + codebook_rows, :] = np.roll(rows, up, axis=-2)
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
    codebooks, a power of two, down which a trellis runs. The last of each may be shorter.
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
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[NDArray[Any]]:
        """Those of the file's tensors, in the order of weight_tensors."""
        groups = [] if self.group_scales is None else [self.group_scales]
        return [self.packed, self.centroids, self.scales, *groups]

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

"""Random clustered matrices, and memory that ends where nobody may read on."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.format import Clustered, CQType, pack
from pyggml_bridge.native import ffi, pointer

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy whose last byte is followed by an inaccessible page: reading past it kills the process."""
    body = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, body + mmap.PAGESIZE)
    raw = np.frombuffer(memory, np.uint8)
    if _libc.mprotect(raw.ctypes.data + body, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = raw[body - array.nbytes : body].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def random_clustered(
    rng: np.random.Generator,
    cq: CQType,
    rows: int,
    cols: int,
    codebook_cols: int | None = None,
    scale_cols: int = 0,
    fill: tuple[int, int, int] | None = None,
    codebook_rows: int = 1,
) -> Clustered:
    """A random [rows, cols] matrix over the whole range of its fields, or filled with one (index, centroid, scale)."""
    codebook_cols = codebook_cols or cols
    n_codebooks, n_groups = -(-cols // codebook_cols), -(-cols // scale_cols) if scale_cols else 0
    indices = random_indices(rng, (rows, cols), cq, codebook_rows)
    centroids = rng.integers(-128, 128, (-(-rows // codebook_rows), n_codebooks * cq.n_centroids), dtype=np.int8)
    centroids[rng.random(centroids.shape) < 0.1] = -128
    group_scales = rng.integers(0, 128, (rows, n_groups), dtype=np.int8)
    for extreme in (0, 127):
        group_scales[rng.random(group_scales.shape) < 0.1] = extreme
    if fill is not None:
        on_trellis = cq.n_centroids // 4 - 1 if cq.trellis else 255  # one part only: no row differs from those above
        indices[:], centroids[:], group_scales[:] = fill[0] & on_trellis, *fill[1:]
    scales = rng.uniform(1e-4, 1e-2, rows).astype(np.float32)
    packed = pack(indices, cq, codebook_rows)
    groups = group_scales if n_groups else None
    return Clustered(cq, packed, centroids, scales, groups, codebook_cols, scale_cols, codebook_rows)


def random_indices(
    rng: np.random.Generator, shape: tuple[int, ...], cq: CQType, codebook_rows: int = 1
) -> NDArray[np.uint8]:
    """Indices [..., rows, cols] that the type can hold: with a trellis, what free bits u and other bits give."""
    if not cq.trellis:
        return rng.integers(0, cq.n_centroids, shape, dtype=np.uint8)
    k = cq.bits
    rest, u = rng.integers(0, 1 << k - 1, shape, dtype=np.uint8), rng.integers(0, 2, shape, dtype=np.uint8)
    out = np.empty(shape, np.uint8)
    for row in range(shape[-2]):
        first = row // codebook_rows * codebook_rows
        n = min(codebook_rows, shape[-2] - first)
        above, above2 = (u[..., first + (row - first - up) % n, :] for up in (1, 2))
        out[..., row, :] = rest[..., row, :] | (u[..., row, :] ^ above2) << k - 1 | above << k
    return out


class NativeMatrix:
    """A Clustered as a cq_matrix whose every array ends at an inaccessible page."""

    def __init__(self, w: Clustered) -> None:
        """Copy the arrays to guarded memory."""
        rows, cols = w.shape
        self._keep = [guarded(w.packed), guarded(w.centroids), guarded(w.scales)]
        self.struct = ffi.new("cq_matrix *", {"type": int(w.cq), "n_experts": 1, "n_rows": rows, "n_cols": cols})
        self.struct.codebook_cols, self.struct.scale_cols = w.codebook_cols, w.scale_cols
        self.struct.codebook_rows = w.codebook_rows
        self.struct.data = pointer(self._keep[0], "const uint8_t *")
        self.struct.centroids = pointer(self._keep[1], "const int8_t *")
        self.struct.scales = pointer(self._keep[2], "const float *")
        if w.group_scales is not None:
            self._keep.append(guarded(w.group_scales))
            self.struct.group_scales = pointer(self._keep[3], "const int8_t *")

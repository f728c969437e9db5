"""Memory of the CPU backend: buffers that values share, and the structs of cq.h that point into arrays."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.native import aligned_empty, ffi, pointer
from pyggml_bridge.operations import Routing
from pyggml_bridge.weights import Matrix


class BufferPool:
    """Buffers by size; a buffer that is given back serves the next array of that size."""

    def __init__(self) -> None:
        """No buffer yet."""
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._taken: dict[int, NDArray[np.uint8]] = {}  # by address
        self.nbytes = 0  # of all buffers

    def take(self, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
        """An array [*shape] of arbitrary contents that starts at a multiple of 64 bytes."""
        n_bytes = np.dtype(dtype).itemsize * shape[0] * shape[1]
        free = self._free[n_bytes]
        buffer = free.pop() if free else self._allocate(n_bytes)
        self._taken[buffer.ctypes.data] = buffer
        return buffer.view(dtype).reshape(shape)

    def _allocate(self, n_bytes: int) -> NDArray[np.uint8]:
        """A new buffer, whose pages the system commits only as they are written."""
        self.nbytes += n_bytes
        return aligned_empty(n_bytes)

    def give_back(self, array: NDArray[Any]) -> None:
        """Let others have the memory of an array that was taken."""
        buffer = self._taken.pop(array.ctypes.data)
        self._free[buffer.nbytes].append(buffer)


@dataclass(frozen=True, eq=False)
class Activation:
    """Quantized rows of a value: q int8 [rows, width], scales float32 and sums int32 [rows, n_scales]."""

    struct: Any  # cq_activation
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

    @classmethod
    def take(cls, pool: BufferPool, shape: tuple[int, int], group: int, bits: int) -> Activation:
        """For values [*shape] with a scale per row (group 0) or per `group` columns."""
        n_rows, width = shape
        n_scales = width // group if group else 1
        q = pool.take(np.int8, shape)
        scales, sums = pool.take(np.float32, (n_rows, n_scales)), pool.take(np.int32, (n_rows, n_scales))
        # Blocks of 32 belong to Q8_0 tensors, which keep 8 bits whatever the file's activation bits.
        struct = ffi.new("cq_activation *", {"bits": 8 if group else bits, "group": group})
        struct.q, struct.scales = pointer(q, "int8_t *"), pointer(scales, "float *")
        struct.sums = pointer(sums, "int32_t *")
        return cls(struct, (q, scales, sums))


@dataclass(frozen=True, eq=False)
class RoutingArrays:
    """The experts of a batch's tokens: ids and weights [n_batch, top_k], and the slots in the order of experts."""

    struct: Any  # cq_routing
    ids: NDArray[np.int32]
    others: tuple[NDArray[Any], ...]  # what the struct points to besides

    @classmethod
    def allocate(cls, routing: Routing, n_batch: int) -> RoutingArrays:
        """Zeroed, for batches of up to n_batch tokens."""
        n_slots = n_batch * routing.top_k
        ids, order = np.zeros((n_batch, routing.top_k), np.int32), np.zeros(n_slots, np.int32)
        weights, offsets = np.zeros(n_slots, np.float32), np.zeros(routing.n_experts + 1, np.int32)
        struct = ffi.new("cq_routing *", {"n_experts": routing.n_experts, "top_k": routing.top_k})
        struct.ids, struct.order = pointer(ids, "int32_t *"), pointer(order, "int32_t *")
        struct.offsets, struct.weights = pointer(offsets, "int32_t *"), pointer(weights, "float *")
        return cls(struct, ids, (order, weights, offsets))


def native_matrix(matrix: Matrix) -> Any:
    """The cq_matrix of a weight; the caller keeps both alive."""
    clustered = matrix.clustered
    struct = ffi.new("cq_matrix *", {"type": int(matrix.type), "n_experts": matrix.n_experts})
    struct.n_rows, struct.n_cols = matrix.n_rows, matrix.n_cols
    struct.data = pointer(matrix.data, "const uint8_t *")
    struct.experts = pointer(matrix.experts, "const int32_t *")
    if clustered is not None:
        struct.codebook_cols, struct.scale_cols = clustered.codebook_cols, clustered.scale_cols
        struct.codebook_rows = clustered.codebook_rows
        struct.centroids = pointer(clustered.centroids, "const int8_t *")
        struct.group_scales = pointer(clustered.group_scales, "const int8_t *")
        struct.scales = pointer(clustered.scales, "const float *")
    return struct

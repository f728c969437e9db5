"""Host memory as the emulated device's: addresses of arrays that end at inaccessible pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pyggml_bridge.cuda.linear import DeviceMatrix, DeviceRouting, group
from pyggml_bridge.format import Clustered
from tests.cuda.emulate import run
from tests.oracle import guarded


class Memory:
    """Arrays that stay alive; `at` gives their address."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def put(self, array: np.ndarray) -> np.ndarray:
        """A guarded copy, kept."""
        copy = guarded(np.ascontiguousarray(array))
        self._arrays.append(copy)
        return copy

    def at(self, array: np.ndarray | None) -> int:
        """The address of a guarded copy; 0 for none."""
        return 0 if array is None else self.put(array).ctypes.data

    def full(self, shape: Any, value: Any, dtype: Any) -> np.ndarray:
        """A guarded array to be written."""
        return self.put(np.full(shape, value, dtype))

    def matrix(self, w: Clustered) -> DeviceMatrix:
        """[rows, cols] or [experts, rows, cols]."""
        *experts, rows, cols = w.shape
        return DeviceMatrix(
            int(w.cq), experts[0] if experts else 1, rows, cols, self.at(w.packed), self.at(w.centroids),
            self.at(w.group_scales), self.at(w.scales), w.codebook_rows, w.codebook_cols, w.scale_cols,
        )  # fmt: skip

    def routing(self, ids: np.ndarray, n_experts: int, weights: np.ndarray | None = None) -> DeviceRouting:
        """Of ids int32 [tokens, top_k], grouped by the kernel."""
        n_tokens, top_k = ids.shape
        weights = np.zeros(ids.shape, np.float32) if weights is None else weights
        order, offsets = self.full(ids.size, -1, np.int32), self.full(n_experts + 1, -1, np.int32)
        tiles = self.full((ids.size // 64 + min(n_experts, ids.size), 2), 77, np.int32)
        addresses = (order.ctypes.data, offsets.ctypes.data, tiles.ctypes.data)
        routing = DeviceRouting(n_experts, top_k, self.at(ids.astype(np.int32)), self.at(weights), *addresses)
        run(group(routing, n_tokens))
        return routing


@contextmanager
def unchanged(array: np.ndarray) -> Iterator[None]:
    """The array is the same afterwards."""
    before = array.copy()
    yield
    np.testing.assert_array_equal(array, before)

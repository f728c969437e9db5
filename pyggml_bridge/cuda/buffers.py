"""Device buffers of what a program's operations read and write: values, activations, routings, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from pyggml_bridge.backend import Quantize
from pyggml_bridge.cuda.linear import DeviceMatrix
from pyggml_bridge.cuda.memory import Buffer, Memory, RoutingBuffers, address, device_routing
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import Routing, Value
from pyggml_bridge.weights import Matrix

MAX_EXPERT_BYTES = 1 << 32  # offsets within one expert's matrix are 32 bits wide: codebook.cuh


class Buffers:
    """Buffers for batches of up to n_batch tokens, planned when they are first asked for.

    `inputs` holds int32 [1 + n_batch]: the first token's position, then the tokens.
    """

    def __init__(self, n_batch: int) -> None:
        """Those of the inputs alone."""
        self.memory = Memory()
        self.inputs = self.memory.new(4 * (1 + n_batch))
        self._n_batch = n_batch
        self._shared: dict[Value | Quantize, tuple[Buffer, ...]] = {}
        self._routings: dict[Routing, RoutingBuffers] = {}
        self._partial: dict[int, Buffer] = {}

    def value(self, value: Value) -> Buffer:
        """float32 [rows, width], shared with values that do not live at the same time."""
        if value not in self._shared:
            self._shared[value] = (self.memory.take(4 * self._n_batch * value.top_k * value.width),)
        return self._shared[value][0]

    def activation(self, quantized: Quantize) -> tuple[Buffer, Buffer]:
        """int8 [rows, width] and the scales float32 [rows, n_scales], shared like values."""
        x, n_rows = quantized.x, self._n_batch * quantized.x.top_k
        if quantized not in self._shared:
            n_scales = x.width // quantized.group if quantized.group else quantized.parts
            self._shared[quantized] = (self.memory.take(n_rows * x.width), self.memory.take(4 * n_rows * n_scales))
        q, scales = self._shared[quantized]
        return q, scales

    def give_back(self, done: Value | Quantize) -> None:
        """Let others have the memory of what nobody reads any more."""
        for buffer in self._shared[done]:
            self.memory.give_back(buffer)

    def routing(self, routing: Routing) -> RoutingBuffers:
        """A routing's arrays; nothing shares their memory."""
        if routing not in self._routings:
            n_slots = self._n_batch * routing.top_k
            n_tiles = device_routing(routing).max_tiles(self._n_batch)
            sizes = (n_slots, n_slots, n_slots, routing.n_experts + 1, 2 * n_tiles)
            self._routings[routing] = RoutingBuffers(*(self.memory.new(4 * size) for size in sizes))
        return self._routings[routing]

    def host(self, array: NDArray[Any] | None) -> Buffer | None:
        """An array that is uploaded once, however many operations read it."""
        return self.memory.host(array)

    def new(self, n_bytes: int) -> Buffer:
        """Memory of its own, zeroed when it is allocated."""
        return self.memory.new(n_bytes)

    def partial(self, n_bytes: int) -> Buffer:
        """What attention leaves for its merge: one buffer per size, as layers run one after the other."""
        if n_bytes not in self._partial:
            self._partial[n_bytes] = self.memory.new(n_bytes)
        return self._partial[n_bytes]

    def matrix(self, w: Matrix) -> Callable[[], DeviceMatrix]:
        """A weight, uploaded once; call the result when buffers have addresses. CQError if it is too large."""
        clustered = w.clustered
        if w.data.nbytes // w.n_experts >= MAX_EXPERT_BYTES:
            raise CQError(f"--cuda: tensor {w.name} has 4 GiB or more in one matrix")
        data = self.memory.host(w.data)
        assert data is not None
        if clustered is None:
            return lambda: DeviceMatrix(int(w.type), w.n_experts, w.n_rows, w.n_cols, data.address)
        arrays = (clustered.centroids, clustered.group_scales, clustered.scales)
        centroids, groups, scales = map(self.memory.host, arrays)
        return lambda: DeviceMatrix(
            int(w.type), w.n_experts, w.n_rows, w.n_cols, data.address, address(centroids), address(groups),
            address(scales), clustered.codebook_rows, clustered.codebook_cols, clustered.scale_cols,
        )  # fmt: skip

"""Device memory as planned: buffers whose sizes are known before anything is allocated."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pyggml_bridge.cuda.kernels import ceil_div
from pyggml_bridge.cuda.linear import DeviceRouting
from pyggml_bridge.operations import Routing

ALIGNMENT = 512  # what CuPy's allocator rounds to


@dataclass(eq=False)
class Buffer:
    """Device memory. address: 0 until it is allocated. host: the array that it is filled with then; None: zeros."""

    nbytes: int
    host: NDArray[Any] | None = None
    address: int = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes as the device's allocator counts them."""
        return ceil_div(max(self.nbytes, 1), ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class RoutingBuffers:
    """A routing's arrays on the device."""

    ids: Buffer
    weights: Buffer
    order: Buffer
    offsets: Buffer
    tiles: Buffer


class Memory:
    """Everything that is to be allocated, in `buffers`."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.buffers: list[Buffer] = []
        self._free: dict[int, list[Buffer]] = defaultdict(list)
        self._hosted: dict[tuple[int, int], Buffer] = {}

    def new(self, nbytes: int, host: NDArray[Any] | None = None) -> Buffer:
        """A buffer that nothing else shares. host: the array that is uploaded to it first."""
        buffer = Buffer(nbytes, host)
        self.buffers.append(buffer)
        return buffer

    def take(self, nbytes: int) -> Buffer:
        """A buffer of this size that was given back, or a new one."""
        return self._free[nbytes].pop() if self._free[nbytes] else self.new(nbytes)

    def give_back(self, buffer: Buffer) -> None:
        """Keep the buffer for the next call of take() with its size."""
        self._free[buffer.nbytes].append(buffer)

    def host(self, array: NDArray[Any] | None) -> Buffer | None:
        """The buffer that an array is uploaded to, the same for every call with this array; None for None."""
        if array is None:
            return None
        found = self.holding(array)
        if found is None:
            found = self._hosted[array.ctypes.data, array.nbytes] = self.new(array.nbytes, array)
        return found

    def holding(self, array: NDArray[Any]) -> Buffer | None:
        """The buffer of an array that is uploaded; None if the program does not read it."""
        return self._hosted.get((array.ctypes.data, array.nbytes))


def address(buffer: Buffer | None) -> int:
    """The buffer's address, 0 for None."""
    return buffer.address if buffer else 0


def device_routing(routing: Routing, buffers: RoutingBuffers | None = None) -> DeviceRouting:
    """A routing as launches take it. Without buffers all addresses are 0, for callers that need the sizes alone."""
    names = ("ids", "weights", "order", "offsets", "tiles")
    addresses = [getattr(buffers, name).address if buffers else 0 for name in names]
    return DeviceRouting(routing.n_experts, routing.top_k, *addresses)

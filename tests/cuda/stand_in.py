"""A stand-in for CuPy: device memory is the host's, kernels run in the emulator, and everything is recorded.

It has what the CUDA backend uses and nothing else, and is as strict as the device: kernels of a capturing stream run
only when the graph is launched, memory is not what NumPy left there, and reading past an allocation kills the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyggml_bridge.cuda.kernels import Launch, Module
from tests.cuda.emulate import run
from tests.oracle import guarded


class CUDARuntimeError(RuntimeError):
    pass


class Array:
    """Bytes on the device."""

    def __init__(self, owner: StandIn, raw: np.ndarray) -> None:
        self._owner, self._raw = owner, raw
        self.data = SimpleNamespace(ptr=raw.ctypes.data)

    def __getitem__(self, part: slice) -> Array:
        return Array(self._owner, self._raw[part])

    def set(self, host: np.ndarray, stream: Any) -> None:
        assert host.nbytes == self._raw.nbytes and stream is self._owner.streams[-1]
        assert not stream.capturing, "a copy from the host would be captured with its address"
        self._owner.uploads.append(host.nbytes)
        self._raw[:] = host

    def get(self, stream: Any, out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        """A copy that does not block is there when the stream is synchronized, and what was in `out` is gone before."""
        assert not stream.capturing
        if out is None:
            return self._raw.copy()
        assert not blocking and out.ctypes.data in self._owner.pinned and out.shape == self._raw.shape
        out[:] = 0xAB
        stream.copies.append((out, self._raw.copy()))
        return out

    def fill(self, value: int) -> None:
        self._raw[:] = value


@dataclass(eq=False)
class Graph:
    owner: StandIn
    launches: list[Launch]

    def launch(self, stream: Any) -> None:
        self.owner.graph_launches += 1
        for launch in self.launches:
            self.owner.execute(launch)


@dataclass(eq=False)
class Stream:
    owner: StandIn
    capturing: list[Launch] | None = None
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __enter__(self) -> Stream:
        self.owner.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.owner.streams.pop()

    def synchronize(self) -> None:
        assert self.capturing is None
        for out, copied in self.copies:
            out[:] = copied
        self.copies.clear()

    def begin_capture(self) -> None:
        self.capturing = []

    def end_capture(self) -> Graph:
        assert self.capturing is not None
        captured, self.capturing = self.capturing, None
        return Graph(self.owner, captured)


@dataclass
class StandIn:
    """The module `cupy`. free_bytes: what the device says it has; executed: every kernel that ran."""

    free_bytes: int = 1 << 40
    devices: int = 1
    capability: tuple[int, int] = (8, 9)
    name: str = "Stand-in"
    driver_error: str = ""
    uint8: Any = np.uint8
    streams: list[Any] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    executed: list[Launch] = field(default_factory=list)
    compiled: dict[Path, Module] = field(default_factory=dict)
    graph_launches: int = 0
    pinned: range = range(0)

    def __post_init__(self) -> None:
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=self._device_count,
            memGetInfo=lambda: (self.free_bytes, 1 << 40),
            getDeviceProperties=lambda _: {
                "name": self.name.encode(), "major": self.capability[0], "minor": self.capability[1],
                "multiProcessorCount": 4,
            },
        )  # fmt: skip
        self.cuda = SimpleNamespace(
            runtime=runtime, Stream=lambda non_blocking: Stream(self), alloc_pinned_memory=self._pin
        )

    def _pin(self, n: int) -> np.ndarray:
        memory = guarded(np.full(n, 0xAB, np.uint8))
        self.pinned = range(memory.ctypes.data, memory.ctypes.data + n)
        return memory

    def _device_count(self) -> int:
        if self.driver_error:
            raise CUDARuntimeError(self.driver_error)
        return self.devices

    def empty(self, n: int, dtype: Any) -> Array:
        """The device's allocations start at multiples of 512; the end is exact up to 16 bytes here."""
        self.allocated.append(n)
        return Array(self, guarded(np.full(-(-n // 16) * 16, 0xAB, np.uint8))[:n])

    def compile(self, module: Module, arch: int) -> Path:
        """In the place of nvrtc.compiled."""
        path = Path(f"{module.source}-{len(self.compiled)}")
        self.compiled[path] = module
        return path

    def RawModule(self, path: str) -> Any:  # CuPy's name
        assert self.streams[-1].capturing is None, "modules cannot be loaded while a stream captures"
        module = self.compiled[Path(path)]
        return SimpleNamespace(get_function=lambda kernel: self._function(module, kernel))

    def _function(self, module: Module, kernel: str) -> Any:
        def call(
            grid: tuple[int, int, int], block: tuple[int, int, int], args: tuple[Any, ...], shared_mem: int
        ) -> None:
            """CuPy passes NumPy scalars and arrays of one element by value, and nothing else of NumPy's."""
            assert all(isinstance(a, np.generic) or (isinstance(a, np.ndarray) and a.size == 1) for a in args)
            launch, stream = Launch(module, kernel, grid, block[0], args, shared_mem), self.streams[-1]
            if stream.capturing is None:
                self.execute(launch)
            else:
                stream.capturing.append(launch)

        return call

    def execute(self, launch: Launch) -> None:
        self.executed.append(launch)
        run(launch, seed=len(self.executed))


def allocated_bytes(device: StandIn) -> int:
    """As a device counts them."""
    return sum(-(-n // 512) * 512 for n in device.allocated)

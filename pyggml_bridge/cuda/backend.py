"""The CUDA backend: runs a program's launches on an NVIDIA GPU. The only file that imports cupy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Arrays, Segments, finish, row_count
from pyggml_bridge.cuda import nvrtc
from pyggml_bridge.cuda.kernels import DeviceInfo, Launch
from pyggml_bridge.cuda.memory import Buffer
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import Value

OLDEST = 75  # compute capability 7.5: dp4a, ldmatrix and integer tensor cores
UPLOAD_BYTES = 64 << 20  # per copy, so that a map larger than memory can be uploaded


def _import_cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise CQError("--cuda: CuPy is missing or incomplete (pip install 'codequant-gguf[cuda]')") from error


def require_device() -> None:
    """CQError, one line, unless this machine can run with --cuda."""
    Device()


class Device:
    """The first CUDA device, checked."""

    def __init__(self) -> None:
        """CQError without CuPy, driver, device or compiler, or if the device is too old."""
        self.cupy = cupy = _import_cupy()
        runtime = cupy.cuda.runtime
        try:
            if not runtime.getDeviceCount():
                raise CQError("--cuda: the driver finds no NVIDIA GPU")
            properties = runtime.getDeviceProperties(0)
        except runtime.CUDARuntimeError as error:
            raise CQError(f"--cuda: no NVIDIA driver, or none that works: {error}") from error
        self.name = properties["name"].decode()
        self.arch: int = 10 * properties["major"] + properties["minor"]
        if self.arch < OLDEST:
            raise CQError(f"--cuda: {self.name} has compute capability {self.arch / 10}, at least 7.5 is needed")
        nvrtc.version()
        turing_without_tensor_cores = self.arch == OLDEST and "GTX 16" in self.name
        self.info = DeviceInfo(properties["multiProcessorCount"], not turing_without_tensor_cores)

    @property
    def free_bytes(self) -> int:
        """What can be allocated now."""
        return int(self.cupy.cuda.runtime.memGetInfo()[0])


class CUDABackend:
    """A program, or a partition of one, on a GPU with enough memory for it."""

    def __init__(self, device: Device, program: CUDAProgram) -> None:
        """Upload the weights."""
        self._device, self._program = device, program
        self._cupy = device.cupy
        self.name = f"CUDA ({device.name})"
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self._arrays: dict[Buffer, Any] = {}
        with self._stream:
            for buffer in self._program.memory.buffers:
                self._place(buffer)
        self._stream.synchronize()
        self._functions: dict[tuple[Any, str], Any] = {}
        self._modules: dict[Any, Any] = {}
        self._graphs: dict[int, Any] = {}  # each segment's launches for one token and its logits
        handed = [sum(4 * program.n_batch * v.top_k * v.width for v in values) for values in self._handed_over()]
        pinned = self._cupy.cuda.alloc_pinned_memory(max(handed)) if handed else b""
        self._pinned: NDArray[np.uint8] = np.frombuffer(pinned, np.uint8, max(handed, default=0))

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """Per MoE layer the experts [n_batch, top_k] of the last batch, copied from the device."""
        found = self._program.routing_ids
        return [self._read(ids, np.int32, (self._program.n_batch, top_k)) for ids, top_k in found]

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """As Backend.run."""
        return finish(self.segments(tokens, position, n_outputs))

    def segments(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> Segments:
        """As Partition.segments. Decoding, one token and its logits, replays a captured graph per segment."""
        inputs = np.concatenate([[position], tokens]).astype(np.int32)
        with self._stream:
            self._arrays[self._program.inputs][: inputs.nbytes].set(inputs.view(np.uint8), stream=self._stream)
        for i, segment in enumerate(self._program.segments):
            with self._stream:
                self._run_segment(i, len(tokens), n_outputs)
            if segment.hands_over:
                received = yield self._send(segment.sends, len(tokens), n_outputs)
                self._recv(segment.recvs, received)
        return self._read(self._program.logits, np.float32, (n_outputs, self._program.vocab_size))

    def _run_segment(self, segment: int, n_tokens: int, n_outputs: int) -> None:
        if not self._program.segments[segment].work:  # the first segment, if the other partition begins
            return
        if n_tokens == 1 and n_outputs == 1:
            if segment not in self._graphs:
                self._graphs[segment] = self._capture(segment)
            self._graphs[segment].launch(self._stream)
        else:
            for launch in self._program.launches(segment, n_tokens, n_outputs):
                self._launch(launch)

    # ---- values to and from the other partition, through pinned memory, which the device reads and writes itself ----

    def _handed_over(self) -> list[list[Value]]:
        """The values of each exchange with the other partition."""
        return [values for segment in self._program.segments for values in (segment.sends, segment.recvs) if values]

    def _send(self, values: list[Value], n_tokens: int, n_outputs: int) -> Arrays:
        arrays, start = [], 0
        for value in values:
            rows = row_count(value, n_tokens, n_outputs)
            host = self._pinned[start : start + 4 * rows * value.width]
            if len(host):
                device = self._arrays[self._program.buffer_of(value)][: len(host)]
                device.get(stream=self._stream, out=host, blocking=False)
            arrays.append(host.view(np.float32).reshape(rows, value.width))
            start += len(host)
        self._stream.synchronize()
        return arrays

    def _recv(self, values: list[Value], received: Arrays) -> None:
        start = 0
        for value, array in zip(values, received, strict=True):
            host = self._pinned[start : start + array.nbytes]
            host[:] = array.view(np.uint8).reshape(-1)
            if len(host):
                with self._stream:
                    self._arrays[self._program.buffer_of(value)][: len(host)].set(host, stream=self._stream)
            start += len(host)

    # ---- memory ----

    def refresh(self, array: NDArray[Any]) -> None:
        """As Backend.refresh: the array is uploaded anew to the address that captured graphs read."""
        buffer = self._program.memory.holding(array)
        if buffer is not None:
            with self._stream:
                self._upload(buffer, array)

    def _place(self, buffer: Buffer) -> None:
        """Allocate a buffer; fill it from the memory map, in pieces, or with zeros."""
        array = self._cupy.empty(max(buffer.nbytes, 1), np.uint8)
        buffer.address, self._arrays[buffer] = int(array.data.ptr), array
        if buffer.host is None:
            array.fill(0)  # positions of the KV cache that were never written are multiplied by zero, so no NaN there
            return
        self._upload(buffer, buffer.host)

    def _upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        host = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        for start in range(0, len(host), UPLOAD_BYTES):
            piece = host[start : start + UPLOAD_BYTES]
            self._arrays[buffer][start : start + len(piece)].set(piece, stream=self._stream)

    def _read(self, buffer: Buffer, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
        n_bytes = np.dtype(dtype).itemsize * shape[0] * shape[1]
        if not n_bytes:
            return np.empty(shape, dtype)
        host = self._arrays[buffer][:n_bytes].get(stream=self._stream)
        self._stream.synchronize()
        return host.view(dtype).reshape(shape)

    # ---- launches ----

    def _capture(self, segment: int) -> Any:
        """A segment's launches for one token as a graph. Modules are loaded before, which a capture does not allow."""
        launches = self._program.launches(segment, 1, 1)
        for launch in launches:
            self._function(launch)
        self._stream.begin_capture()
        for launch in launches:
            self._launch(launch)
        return self._stream.end_capture()

    def _function(self, launch: Launch) -> Any:
        key = launch.module, launch.kernel
        if key not in self._functions:
            if launch.module not in self._modules:
                path = nvrtc.compiled(launch.module, self._device.arch)
                self._modules[launch.module] = self._cupy.RawModule(path=str(path))
            self._functions[key] = self._modules[launch.module].get_function(launch.kernel)
        return self._functions[key]

    def _launch(self, launch: Launch) -> None:
        block = (launch.threads, 1, 1)
        self._function(launch)(launch.grid, block, launch.args, shared_mem=launch.shared_bytes)

"""The CUDA backend: runs a program's launches on an NVIDIA GPU. The only file that imports cupy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge import nvrtc
from pyggml_bridge import program as p
from pyggml_bridge.cuda_kernels import Launch
from pyggml_bridge.cuda_program import Buffer, CUDAProgram, DeviceInfo
from pyggml_bridge.errors import CQError

OLDEST = 75  # compute capability 7.5: dp4a, ldmatrix and integer tensor cores
UPLOAD_BYTES = 64 << 20  # at once, so that a map larger than memory is read through


def _import_cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise CQError("--cuda: CuPy is missing or incomplete (pip install 'codequant-gguf[cuda]')") from error


def require_device() -> None:
    """CQError, one line, unless this machine can run with --cuda."""
    _Device()


class _Device:
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


class CUDABackend:
    """A program on the first GPU, for batches of up to n_batch tokens."""

    def __init__(self, program: p.Program, n_batch: int) -> None:
        """Upload the weights; CQError before that if they, the buffers and the KV cache do not fit."""
        self._device = _Device()
        self._cupy = self._device.cupy
        self.name = f"CUDA ({self._device.name})"
        self._n_batch, self._vocab_size = n_batch, program.vocab_size
        self._program = CUDAProgram(program, n_batch, self._device.info)
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        if self._program.nbytes > free:
            needed = f"{self._program.nbytes / 1e9:.2f} GB"
            raise CQError(
                f"--cuda: {needed} needed on {self._device.name}, {free / 1e9:.2f} GB free: try a smaller --ctx"
            )
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self._arrays: dict[Buffer, Any] = {}
        with self._stream:
            for buffer in self._program.buffers:
                self._place(buffer)
        self._stream.synchronize()
        self._functions: dict[tuple[Any, str], Any] = {}
        self._modules: dict[Any, Any] = {}
        self._decode: Any = None  # the captured graph of one token and its logits

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """Per MoE layer the experts [n_batch, top_k] of the last batch, copied from the device."""
        routings = self._program.routings.items()
        return [self._read(buffers.ids, np.int32, (self._n_batch, routing.top_k)) for routing, buffers in routings]

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """As Backend.run. One token with its logits, which is decoding, replays a captured graph."""
        inputs = np.concatenate([[position], tokens]).astype(np.int32)
        with self._stream:
            self._arrays[self._program.inputs][: inputs.nbytes].set(inputs.view(np.uint8), stream=self._stream)
            if len(tokens) == 1 and n_outputs == 1:
                self._decode = self._decode or self._capture()
                self._decode.launch(self._stream)
            else:
                for launch in self._program.launches(len(tokens), n_outputs):
                    self._launch(launch)
        return self._read(self._program.logits, np.float32, (n_outputs, self._vocab_size))

    def _place(self, buffer: Buffer) -> None:
        """Allocate, and copy what the file holds in pieces straight from the map."""
        array = self._cupy.empty(max(buffer.nbytes, 1), np.uint8)
        buffer.address, self._arrays[buffer] = int(array.data.ptr), array
        if buffer.host is None:
            array.fill(0)  # positions of the KV cache that were never written are multiplied by zero, so no NaN there
            return
        host = np.ascontiguousarray(buffer.host).view(np.uint8).reshape(-1)
        for start in range(0, len(host), UPLOAD_BYTES):
            piece = host[start : start + UPLOAD_BYTES]
            array[start : start + len(piece)].set(piece, stream=self._stream)

    def _read(self, buffer: Buffer, dtype: Any, shape: tuple[int, int]) -> NDArray[Any]:
        n_bytes = np.dtype(dtype).itemsize * shape[0] * shape[1]
        if not n_bytes:
            return np.empty(shape, dtype)
        host = self._arrays[buffer][:n_bytes].get(stream=self._stream)
        self._stream.synchronize()
        return host.view(dtype).reshape(shape)

    def _capture(self) -> Any:
        """The launches of one token as a graph; what they load must be there before."""
        launches = self._program.launches(1, 1)
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

"""Programs on a GPU, whole or cut in two: what is read least often per byte of it stays with the CPU.

Of a Mixture of Experts a token reads everything but the experts in full, and of these top_k of n_experts. So the
experts are what the first layers leave in host memory, where the CPU multiplies them; attention, KV cache, router and
shared expert of all layers stay on the GPU. A dense layer has nothing of that kind: there whole layers go to the CPU,
which hands the residual stream over once. The embedding, one row a token, is the CPU's in both cases.
docs/decisions/cuda.md has the figures.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Backend, Partition, updated_in_place, values_of
from pyggml_bridge.cpu.backend import CPUBackend
from pyggml_bridge.cuda.backend import CUDABackend, Device
from pyggml_bridge.cuda.kernels import DeviceInfo
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import Embed, Op, Recv, Route, Rows, SelectOutputs, Send, Value
from pyggml_bridge.program import Program

RESERVED_BYTES = 64 << 20  # for compiled kernels and graphs; what they take has not been measured


# ---- cutting ----


def on_cpu(program: Program, gpu_layers: int) -> list[bool]:
    """Per operation whether the CPU computes it when the last gpu_layers layers, fewer than all, are on the GPU."""
    assert len(program.layer_starts) == program.n_layers and 0 <= gpu_layers < program.n_layers
    output = next(i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs))
    first = [*program.layer_starts, output][program.n_layers - gpu_layers]
    chosen = [i < first and (not program.routings or _of_experts(op, program)) for i, op in enumerate(program.ops)]
    return [chosen[i] or isinstance(op, Embed) for i, op in enumerate(program.ops)]


def _of_experts(op: Op, program: Program) -> bool:
    """Whether an operation chooses experts or is theirs; an expert that all tokens go to does not count."""
    if isinstance(op, Route):
        return op.routing in program.routings
    return any(value.rows is Rows.SLOTS for value in values_of(op))


def cut(program: Program, on_cpu: Sequence[bool]) -> tuple[Program, Program]:
    """The CPU's and the GPU's partition: a value is sent to the partition that needs it and lacks what is in it now."""
    partitions = {cpu: replace(program, ops=[], routings=[], logits=None, layer_starts=[]) for cpu in (True, False)}
    current: dict[Value, set[bool]] = {}  # which partitions have it
    for cpu, group in groupby(zip(on_cpu, program.ops, strict=True), key=lambda pair: pair[0]):
        ops = [op for _, op in group]
        mine, other = partitions[cpu], partitions[not cpu]
        lacking = [value for value in _needed(ops) if cpu not in current.get(value, {cpu})]
        assert lacking or not current, "each segment needs something of the one before, which the other partition ran"
        other.ops += [Send(value) for value in lacking]
        mine.ops += [*(Recv(value) for value in lacking), *ops]
        current.update((value, {True, False}) for value in lacking)
        current.update((value, {cpu}) for op in ops for value in _changed(op))
        mine.routings += [op.routing for op in ops if isinstance(op, Route) and op.routing in program.routings]
    mine.logits = program.logits
    return partitions[True], partitions[False]


def _changed(op: Op) -> list[Value]:
    found = (getattr(op, "out", None), updated_in_place(op))
    return [value for value in found if value is not None]


def _needed(ops: Sequence[Op]) -> list[Value]:
    """The values that operations read before they write them, each once."""
    needed: dict[Value, None] = {}
    written: set[Value] = set()
    for op in ops:
        fresh = {value for value in _changed(op) if value is not updated_in_place(op)}
        needed |= dict.fromkeys(value for value in values_of(op) if value not in written | fresh)
        written.update(_changed(op))
    return list(needed)


# ---- running ----


class SplitBackend:
    """Two partitions whose segments run in turn; the host's is first and the device's last."""

    def __init__(self, name: str, host: Partition, device: Partition) -> None:
        """The partitions of one program."""
        self.name, self._host, self._device = name, host, device

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """As Backend's: the layers with experts on the host come first."""
        return [*self._host.routing_ids, *self._device.routing_ids]

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """As Backend.run."""
        host, device = (partition.segments(tokens, position, n_outputs) for partition in (self._host, self._device))
        next(device)  # sends nothing, and waits
        sent = next(host)
        while True:
            try:
                sent = device.send(sent)
            except StopIteration as end:
                return end.value
            sent = host.send(sent)

    def refresh(self, array: NDArray[Any]) -> None:
        """As Backend.refresh."""
        self._host.refresh(array)
        self._device.refresh(array)


def gpu_backend(program: Program, n_batch: int, n_threads: int, gpu_layers: int) -> Backend:
    """The program with gpu_layers of its layers wholly on the GPU.

    CQError, before anything is uploaded, if what is there does not fit, with the number of layers that would.
    """
    device = Device()
    partition, planned = _plan(program, n_batch, device.info, gpu_layers)
    free = device.free_bytes
    if _needed_bytes(planned) > free:
        fits = most_layers(program, n_batch, device.info, free, below=gpu_layers)
        advice = "a smaller --ctx" if fits is None else f"--gpu-layers {fits} or a smaller --ctx"
        needed = f"{_needed_bytes(planned) / 1e9:.2f} GB needed on {device.name}, {free / 1e9:.2f} GB free"
        raise CQError(f"--cuda: {needed}: try {advice}")
    on_device = CUDABackend(device, planned)
    if partition is None:
        return on_device
    host = CPUBackend(partition, n_batch, n_threads)
    name = f"CUDA ({device.name}, {gpu_layers} of {program.n_layers} layers), {host.name}"
    return SplitBackend(name, host, on_device)


def most_layers(program: Program, n_batch: int, device: DeviceInfo, free_bytes: int, below: int) -> int | None:
    """The most layers, fewer than `below`, with which the GPU's partition fits in free_bytes; None: none at all."""

    def needed(gpu_layers: int) -> int:  # more layers need more
        return _needed_bytes(_plan(program, n_batch, device, gpu_layers)[1])

    n_fitting = bisect_right(range(below), free_bytes, key=needed)
    return n_fitting - 1 if n_fitting else None


def _plan(program: Program, n_batch: int, device: DeviceInfo, gpu_layers: int) -> tuple[Program | None, CUDAProgram]:
    """The CPU's partition, if it has one, and the GPU's."""
    if gpu_layers == program.n_layers:
        return None, CUDAProgram(program, n_batch, device)
    host, rest = cut(program, on_cpu(program, gpu_layers))
    return host, CUDAProgram(rest, n_batch, device)


def _needed_bytes(planned: CUDAProgram) -> int:
    return planned.nbytes + RESERVED_BYTES

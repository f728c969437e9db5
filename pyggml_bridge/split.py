"""Programs on a GPU, whole or cut in two: the CPU has the weights of which a token reads the smallest share.

In a Mixture of Experts a token reads all weights in full except the experts, of which it reads top_k of n_experts. So
the first layers leave their experts in host memory, where the CPU multiplies them; attention, KV cache, router and
shared expert of all layers stay on the GPU. A dense layer has no such weights: of a dense model the first layers go to
the CPU whole, and it sends the residual stream to the GPU once. The embedding, of which a token reads one row, is the
CPU's in both cases. docs/decisions/cuda.md has the figures.

Each of the two partitions of a program is a sequence of segments. They alternate: a segment of one partition computes
values that the next segment, of the other partition, needs.
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

RESERVED_BYTES = 64 << 20  # for compiled kernels and graphs; their size has not been measured


# ---- cutting ----


def on_cpu(program: Program, gpu_layers: int) -> list[bool]:
    """Per operation: does the CPU compute it if the last gpu_layers layers, fewer than all, are wholly on the GPU?"""
    assert len(program.layer_starts) == program.n_layers and 0 <= gpu_layers < program.n_layers
    output = next(i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs))
    first = [*program.layer_starts, output][program.n_layers - gpu_layers]
    chosen = [i < first and (not program.routings or _of_experts(op, program)) for i, op in enumerate(program.ops)]
    return [chosen[i] or isinstance(op, Embed) for i, op in enumerate(program.ops)]


def _of_experts(op: Op, program: Program) -> bool:
    """Whether an operation chooses experts or computes them; shared experts, which all tokens go to, do not count."""
    if isinstance(op, Route):
        return op.routing in program.routings
    return any(value.rows is Rows.SLOTS for value in values_of(op))


def cut(program: Program, on_cpu: Sequence[bool]) -> tuple[Program, Program]:
    """The CPU's and the GPU's partition. A value is sent to the partition that needs it and has no current copy of it.

    on_cpu: per operation, as on_cpu() returns it.
    """
    partitions = {cpu: replace(program, ops=[], routings=[], logits=None, layer_starts=[]) for cpu in (True, False)}
    current: dict[Value, set[bool]] = {}  # the partitions (True: the CPU's) that have what is in it now
    for cpu, group in groupby(zip(on_cpu, program.ops, strict=True), key=lambda pair: pair[0]):
        ops = [op for _, op in group]
        mine, other = partitions[cpu], partitions[not cpu]
        lacking = [value for value in _needed(ops) if cpu not in current.get(value, {cpu})]
        assert lacking or not current, "each segment needs a value of the segment before, which the other partition ran"
        other.ops += [Send(value) for value in lacking]
        mine.ops += [*(Recv(value) for value in lacking), *ops]
        current.update((value, {True, False}) for value in lacking)
        current.update((value, {cpu}) for op in ops for value in _changed(op))
        mine.routings += [op.routing for op in ops if isinstance(op, Route) and op.routing in program.routings]
    mine.logits = program.logits
    return partitions[True], partitions[False]


def _changed(op: Op) -> list[Value]:
    """The values that an operation writes, in whole or in place."""
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
    """Two partitions whose segments alternate: the host's first segment begins, the device's last one ends."""

    def __init__(self, name: str, host: Partition, device: Partition) -> None:
        """The partitions of one program."""
        self.name, self._host, self._device = name, host, device

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """As Backend.routing_ids: the layers with experts on the host come first."""
        return [*self._host.routing_ids, *self._device.routing_ids]

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """As Backend.run."""
        host, device = (partition.segments(tokens, position, n_outputs) for partition in (self._host, self._device))
        next(device)  # its first segment has no operations: it sends nothing and waits for the host's values
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

    CQError if the GPU's partition does not fit in its memory, with the number of layers that would fit; nothing has
    been uploaded then.
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
    """The most layers, fewer than `below`, with which the GPU's partition fits in free_bytes; None if none does."""

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

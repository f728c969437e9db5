"""Decoder layers quantized one after another, each on what the quantized layers below it compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibrate.capture import capture
from ..calibrate.fisher import Sensitivity
from ..calibrate.gradients import LayerSensitivity
from ..calibrate.hessian import Hessian
from ..calibrate.layer_stream import LayerStream
from ..calibrate.streamed_experts import Expert, Routed, streamed_experts
from ..console import progress
from ..estimate.memory import task_bytes, workers
from ..results import Tuned
from ..settings import Settings
from ..source.architecture import Architecture, Layer, Linear
from ..transform.transformed_model import TransformedModel
from ..transform.weight_layout import WeightLayout
from .matrix import Quantized, QuantizedExperts, quantize, store_unclustered
from .paper.centroid_tuning import CentroidTuner, Codebooks
from .paper.layer_pair import LayerPair
from .plan import Plan, PlannedTensor
from .spill_file import SpillFile
from .task_pool import Task, run_tasks

Tensors = dict[str, Quantized | QuantizedExperts]  # by GGUF stem


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's tensors in file order and in the file's layout.

    tokens: per expert, [] if dense; tuned: what fine-tuning did to it.
    """

    tensors: Tensors
    tokens: list[int]
    tuned: Tuned | None = None


@dataclass
class _Seen:
    """What calibration showed of a layer: Hessians by linear input, tokens of experts; nothing without a text."""

    hessians: dict[str, Hessian] = field(default_factory=dict)
    routed: Routed | None = None
    sensitivity: LayerSensitivity | None = None


@dataclass(frozen=True)
class LayerQuantizer:
    """The stage that clusters. Holds one layer at a time, and of its experts those that are being clustered.

    folder: where finished experts lie until their layer is written.
    """

    settings: Settings
    plan: Plan
    model: TransformedModel
    stream: LayerStream
    folder: Path
    sensitivity: Sensitivity | None = None
    tuner: CentroidTuner | None = None

    def layout(self, linear: Linear) -> WeightLayout:
        """How the file holds this linear."""
        heads = getattr(self.model.checkpoint.config, linear.rope_heads) if linear.rope_heads else 0
        return WeightLayout(heads, self.plan.hadamard if linear.hadamard else 0)

    def layers(self, hidden: Tensor | None, first: int = 0) -> Iterator[QuantizedLayer]:
        """The layers from `first` on. hidden [sequences, n, hidden]: the calibration's input, overwritten, or None."""
        with progress("clustering", len(self.plan.layers)) as advance:
            advance(step=first)
            for index, planned in enumerate(self.plan.layers[first:], first):
                yield self._layer(index, planned, hidden)
                advance(f"layer {index}")

    def _layer(self, index: int, planned: tuple[PlannedTensor, ...], hidden: Tensor | None) -> QuantizedLayer:
        layer = self.model.layer(index)
        seen, module = _Seen(), None
        if hidden is not None:
            module = self.stream.module(index, layer, partial(self.model.expert, index))
            seen = self._calibrate(index, module, hidden)
        tensors = self._quantize(index, layer, planned, seen)
        n_experts = self.model.n_experts(index) if seen.routed else 0
        tokens = [len(seen.routed.rows(number)[0]) for number in range(n_experts)] if seen.routed else []
        tuned = None
        del layer, seen  # as large as the hidden states
        if hidden is not None and module is not None:
            if self.tuner:
                tuned = self._tune(index, self.tuner, tensors, hidden)
            self._advance(index, module, tensors, hidden)
        return QuantizedLayer(tensors, tokens, tuned)

    def _calibrate(self, index: int, module: nn.Module, hidden: Tensor) -> _Seen:
        sensitivity = self.sensitivity.layer(index) if self.sensitivity else None
        weights = sensitivity.token_weights if sensitivity else None
        with capture(self.model.checkpoint.arch_of(index), module, weights) as hessians:
            routed = self.stream.without_experts(module, hidden.clone())
        return _Seen(hessians, routed, sensitivity)

    def _quantize(self, index: int, layer: Layer, planned: tuple[PlannedTensor, ...], seen: _Seen) -> Tensors:
        arch = self.model.checkpoint.arch_of(index)
        tensors: Tensors = {}
        calibrated = bool(seen.hessians)
        for spec, tensor in zip(arch.unquantized, planned, strict=False):
            tensors[spec.name] = store_unclustered(tensor, layer[spec.name])
        tasks: list[Task] = []
        experts: dict[str, QuantizedExperts] = {}
        outputs = seen.sensitivity.outputs if seen.sensitivity else {}
        for linear, tensor in zip(arch.linears, planned[len(arch.unquantized) :], strict=True):
            if linear.experts:
                tensors[linear.name] = experts[linear.name] = self._experts(index, tensor)
                continue
            packed = outputs.get(linear.name)
            output = packed[0].hessian() if packed else None
            tensors[linear.name] = self._linear(tensor, linear, layer, seen.hessians, output, tasks)
            del output
        clustered = [tensor for tensor in tensors.values() if isinstance(tensor, Quantized) and tensor.fits]
        self._run(tasks, [[tensor.planned.shape[-2:]] for tensor in clustered], calibrated)
        if experts:
            seen.hessians.clear()
            for quantized in clustered if not self.settings.tunes_centroids else []:
                quantized.finish(self.settings.threads)
            shapes = [tensor.planned.shape[-2:] for tensor in experts.values()]
            self._run(self._expert_tasks(index, experts, seen), [shapes], calibrated)
        return tensors

    def _run(self, tasks: list[Task], shapes: list[list[tuple[int, ...]]], calibrated: bool) -> None:
        """As many tasks side by side as the memory allows, and forgets them. Each clusters matrices of some shapes."""
        if tasks:
            largest = max(task_bytes(each, self.settings, calibrated) for each in shapes)
            run_tasks(tasks, self.settings.threads, workers(self.settings, largest, len(tasks)))
            tasks.clear()

    def _linear(
        self,
        planned: PlannedTensor,
        linear: Linear,
        layer: Layer,
        inputs: dict[str, Hessian],
        output: Hessian | None,
        tasks: list[Task],
    ) -> Quantized:
        """Takes its weight out of the layer, and out of inputs what no other linear reads: both may be large."""
        layout = self.layout(linear)
        hessian = (inputs.pop if layout.hadamard else inputs.get)(linear.input, None)
        hessian = hessian and hessian.in_layout(layout)
        weight = layout.to_file(layer.pop(linear.name)).contiguous()
        by_output = output and output.of_outputs(layout)
        quantized, own = quantize(planned, weight, hessian, by_output, self.settings.refinement)
        tasks += own
        return quantized

    # ---- experts ----

    def _experts(self, index: int, planned: PlannedTensor) -> QuantizedExperts:
        """With a place for each: on disk, where nothing changes them once they are finished."""
        n_experts = self.model.n_experts(index)
        if self.settings.tunes_centroids:
            return QuantizedExperts(planned, [Quantized(planned, None, None, [], None)] * n_experts)
        return QuantizedExperts(planned, SpillFile(self.folder, n_experts))

    def _expert_tasks(self, index: int, experts: dict[str, QuantizedExperts], seen: _Seen) -> list[Task]:
        """One task per expert: read, calibrate, cluster its linears, forget everything but the result."""
        shared = _shared_outputs(seen.sensitivity, experts)
        cost = 0
        for linear in experts.values():
            *_, rows, cols = linear.planned.shape
            cost += rows * cols * cols
        run = partial(self._cluster_expert, index, experts, seen, shared)
        return [Task(cost, partial(run, number)) for number in range(self.model.n_experts(index))]

    def _cluster_expert(
        self,
        index: int,
        experts: dict[str, QuantizedExperts],
        seen: _Seen,
        shared: dict[str, Hessian],
        number: int,
        n_threads: int,
    ) -> None:
        arch = self.model.checkpoint.arch_of(index)
        layer = self.model.expert(index, number)
        inputs = self._expert_hessians(index, layer, seen, number)
        linears = [linear for linear in arch.linears if linear.experts]
        for i, linear in enumerate(linears):
            tasks: list[Task] = []
            output = shared.get(linear.name)
            packed = seen.sensitivity.outputs.get(linear.name, []) if seen.sensitivity else []
            if packed and output is None:
                output = packed[number].hessian()
            planned = experts[linear.name].planned.of_expert(number)
            quantized = self._linear(planned, linear, layer, inputs, output, tasks)
            still_read = {later.input for later in linears[i + 1 :]}
            inputs = {input_name: hessian for input_name, hessian in inputs.items() if input_name in still_read}
            while tasks:  # which hold what they work on
                tasks.pop().run(n_threads)
            if not self.settings.tunes_centroids:
                quantized.finish(n_threads)
            experts[linear.name].experts[number] = quantized

    def _expert_hessians(self, index: int, layer: Layer, seen: _Seen, number: int) -> dict[str, Hessian]:
        """By linear input, of what the linears of one expert [out, in] read; nothing without a text."""
        arch = self.model.checkpoint.arch_of(index)
        if not seen.routed:
            return {}
        input_name = arch.experts_module or ""
        weights = seen.sensitivity.token_weights[input_name] if seen.sensitivity else None
        expert = Expert.of(arch, layer, self.stream.activation(index))
        return dict(
            zip((input_name, f"{input_name}.hidden"), seen.routed.hessians(number, expert, weights), strict=True)
        )

    # ---- after clustering ----

    def _advance(self, index: int, module: nn.Module, tensors: Tensors, hidden: Tensor) -> None:
        """hidden becomes the output of the quantized layer."""
        arch = self.model.checkpoint.arch_of(index)
        arch.install(module, self.effective(arch, tensors, experts=False))
        experts = streamed_experts(module)
        if experts:
            experts.expert = partial(self._effective_expert, arch, tensors, self.stream.activation(index))
        self.stream.forward(module, hidden)

    def _effective_expert(self, arch: Architecture, tensors: Tensors, act: Any, number: int) -> Expert:
        layer = {}
        for linear in sorted(arch.linears, key=lambda linear: not linear.hadamard):  # first what needs another copy
            experts = tensors[linear.name]
            if isinstance(experts, QuantizedExperts):
                stored = experts.experts[number].weight(self.settings.threads)
                layer[linear.name] = self.layout(linear).from_file(stored)
                del stored
        return Expert.of(arch, layer, act)

    def effective(self, arch: Architecture, tensors: Tensors, experts: bool = True) -> Layer:
        """The weights that the file stands for, in transformers' layout; with the experts' or without."""
        n_threads = self.settings.threads
        layer = {spec.name: tensors[spec.name].weight(n_threads) for spec in arch.unquantized}
        for linear in arch.linears:
            if experts or not linear.experts:
                layer[linear.name] = self.layout(linear).from_file(tensors[linear.name].weight(n_threads))
        return layer

    def _tune(self, index: int, tuner: CentroidTuner, tensors: Tensors, hidden: Tensor) -> Tuned:
        arch = self.model.checkpoint.arch_of(index)
        books, fixed = [], {}
        for linear in arch.linears:
            quantized, layout = tensors[linear.name], self.layout(linear)
            if quantized.fits and linear.measured:
                books.append(Codebooks(linear, quantized, layout))
            else:
                fixed[linear.name] = layout.from_file(quantized.weight(self.settings.threads))
        module = self.stream.module(index, self.model.whole_layer(index))
        return tuner.tune(LayerPair(self.stream, arch, module, fixed), books, hidden)


def _shared_outputs(sensitivity: LayerSensitivity | None, linears: Iterable[str]) -> dict[str, Hessian]:
    """Of those linears whose outputs' Hessian all experts share, factored before several threads ask for it."""
    packed = {name: sensitivity.outputs.get(name, []) for name in linears} if sensitivity else {}
    shared = {name: entries[0].hessian() for name, entries in packed.items() if len(entries) == 1}
    for hessian in shared.values():
        _ = hessian.cholesky, hessian.damped
    return shared

"""Decoder layers quantized one after another, each on what the quantized layers below it compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .accf import CentroidTuner, Codebooks
from .architecture import Architecture, Layer, Linear
from .basis import FileBasis
from .calibration import Statistics, capture
from .layer_pair import LayerPair
from .moments import Moments
from .plan import Plan, PlannedTensor
from .quantize import Quantized, quantize, quantize_plain
from .report import Tuned, progress
from .sensitivity import Sensitivity
from .settings import Settings
from .side_by_side import Task, run_tasks
from .stream import LayerStream
from .transform import TransformedModel


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's tensors by GGUF stem, in file order and in the file's basis.

    tokens: per expert, [] if dense; tuned: what fine-tuning did to it.
    """

    tensors: dict[str, Quantized]
    tokens: list[int]
    tuned: Tuned | None = None


@dataclass(frozen=True)
class LayerQuantizer:
    """The stage that clusters. Holds one layer at a time."""

    settings: Settings
    plan: Plan
    model: TransformedModel
    stream: LayerStream
    sensitivity: Sensitivity | None = None
    tuner: CentroidTuner | None = None

    def basis(self, linear: Linear) -> FileBasis:
        """How the file holds this linear."""
        heads = getattr(self.model.checkpoint.config, linear.rope_heads) if linear.rope_heads else 0
        return FileBasis(heads, self.plan.hadamard if linear.hadamard else 0)

    def layers(self, hidden: Tensor | None, first: int = 0) -> Iterator[QuantizedLayer]:
        """The layers from `first` on. hidden [sequences, n, hidden]: the calibration's input, overwritten, or None."""
        with progress("clustering", len(self.plan.layers)) as advance:
            advance(step=first)
            for index, planned in enumerate(self.plan.layers[first:], first):
                yield self._layer(index, planned, hidden)
                advance(f"layer {index}")

    def _layer(self, index: int, planned: tuple[PlannedTensor, ...], hidden: Tensor | None) -> QuantizedLayer:
        arch, config = self.model.checkpoint.arch_of(index), self.model.checkpoint.config
        layer = self.model.layer(index)
        statistics: Statistics = {}
        module: Any = None
        sensitivity = self.sensitivity.layer(index) if self.sensitivity else None
        outputs = sensitivity.outputs if sensitivity else {}
        if hidden is not None:
            module = self.stream.module(index, layer)
            weights = sensitivity.token_weights if sensitivity else None
            with capture(arch, module, arch.n_experts(config), weights) as statistics:
                self.stream.forward(module, hidden.clone())
        tensors, n_plain = {}, len(arch.plain)
        for spec, tensor in zip(arch.plain, planned, strict=False):
            tensors[spec.name] = quantize_plain(tensor, layer[spec.name])
        tasks: list[Task] = []
        for linear, tensor in zip(arch.linears, planned[n_plain:], strict=True):
            tensors[linear.name], own = self._linear(tensor, linear, layer[linear.name], statistics, outputs)
            tasks += own
        run_tasks(tasks, self.settings.threads)
        tuned = None
        if hidden is not None:
            if self.tuner:
                tuned = self._tune(arch, self.tuner, module, tensors, hidden)
            arch.install(module, self.effective(arch, tensors))
            self.stream.forward(module, hidden)
        tokens = [entry.tokens for entry in statistics[arch.experts_site]] if arch.experts_site and statistics else []
        return QuantizedLayer(tensors, tokens, tuned)

    def _tune(
        self, arch: Architecture, tuner: CentroidTuner, module: Any, tensors: dict[str, Quantized], hidden: Tensor
    ) -> Tuned:
        books, fixed = [], {}
        for linear in arch.linears:
            quantized, basis = tensors[linear.name], self.basis(linear)
            if quantized.fits and linear.measured:
                books.append(Codebooks(linear, quantized, basis))
            else:
                fixed[linear.name] = basis.from_file(quantized.weight(self.settings.threads))
        return tuner.tune(LayerPair(self.stream, arch, module, fixed), books, hidden)

    def _linear(
        self,
        planned: PlannedTensor,
        linear: Linear,
        weight: Tensor,
        statistics: Statistics,
        outputs: dict[str, list[Moments]],
    ) -> tuple[Quantized, list[Task]]:
        basis = self.basis(linear)
        by_output = [entry.of_outputs(basis) for entry in outputs.get(linear.name, ())]
        moments = [entry.in_basis(basis) for entry in statistics.get(linear.site, ())]
        stored = basis.to_file(weight).contiguous()
        return quantize(planned, stored, moments, by_output, self.settings.refinement)

    def effective(self, arch: Architecture, tensors: dict[str, Quantized]) -> Layer:
        """The weights that the file stands for, in transformers' basis."""
        n_threads = self.settings.threads
        layer = {spec.name: tensors[spec.name].weight(n_threads) for spec in arch.plain}
        for linear in arch.linears:
            layer[linear.name] = self.basis(linear).from_file(tensors[linear.name].weight(n_threads))
        return layer

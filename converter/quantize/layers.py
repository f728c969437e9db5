"""Decoder layers quantized one after another, each on what the quantized layers below it compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibrate.capture import capture
from ..calibrate.fisher import Sensitivity
from ..calibrate.layer_stream import LayerStream
from ..calibrate.streamed_experts import Expert, streamed_experts
from ..console import progress
from ..results import Tuned
from ..settings import Settings
from ..source.architecture import Architecture, Layer, Linear
from ..transform.transformed_model import TransformedModel
from ..transform.weight_layout import WeightLayout, layout_of
from .experts import StoredExperts
from .layer_clustering import LayerClustering, Seen, stored
from .plan import Plan
from .tuner import Fitted, Stored, Tuner


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's tensors by GGUF stem, in file order and in the file's layout.

    tokens: how many each expert got, [] if dense; tuned: what fine-tuning did to the layer.
    """

    tensors: dict[str, Stored]
    tokens: list[int]
    tuned: Tuned | None = None


@dataclass(frozen=True)
class LayerQuantizer:
    """The stage that clusters. Holds one layer at a time, and of its experts those that are being clustered.

    folder: where finished experts lie until their layer is written. tuner: where codebooks change after clustering.
    """

    settings: Settings
    plan: Plan
    model: TransformedModel
    stream: LayerStream
    folder: Path
    sensitivity: Sensitivity | None = None
    tuner: Tuner | None = None

    @property
    def clustering(self) -> LayerClustering:
        """What clusters one layer."""
        keeps_fits = self.tuner is not None
        return LayerClustering(self.settings, self.plan, self.model, self.stream, self.folder, keeps_fits)

    def layout(self, linear: Linear) -> WeightLayout:
        """How the file holds this linear."""
        return layout_of(linear, self.model.checkpoint.config, self.plan.hadamard)

    def layers(self, hidden: Tensor | None, first: int = 0) -> Iterator[QuantizedLayer]:
        """The layers from `first` on. hidden [sequences, n, hidden]: the calibration's input, overwritten, or None."""
        n_layers = len(self.plan.layers)
        with progress("clustering", n_layers) as advance:
            advance(step=first)
            for index in range(first, n_layers):
                yield self._by_weights_alone(index) if hidden is None else self._calibrated(index, hidden)
                advance(f"layer {index}")

    def _by_weights_alone(self, index: int) -> QuantizedLayer:
        return QuantizedLayer(self._stored(self.clustering.cluster(index, self.model.layer(index), Seen())), [])

    def _calibrated(self, index: int, hidden: Tensor) -> QuantizedLayer:
        layer = self.model.layer(index)
        module = self.stream.module(index, layer, partial(self.model.expert, index))
        seen = self._observe(index, module, hidden)
        weights = self.clustering.cluster(index, layer, seen)
        n_experts = self.model.n_experts(index)
        tokens = [len(seen.routed.rows(number)[0]) for number in range(n_experts)] if seen.routed else []
        del layer, seen  # as large as the hidden states
        tuned = self.tuner.tune(index, weights, hidden) if self.tuner else None
        tensors = self._stored(weights)
        self._advance(index, module, tensors, hidden)
        return QuantizedLayer(tensors, tokens, tuned)

    def _observe(self, index: int, module: nn.Module, hidden: Tensor) -> Seen:
        """Run the original layer on hidden, which stays as it is."""
        sensitivity = self.sensitivity.layer(index) if self.sensitivity else None
        weights = sensitivity.token_weights if sensitivity else None
        with capture(self.model.checkpoint.arch_of(index), module, weights) as hessians:
            routed = self.stream.without_experts(module, hidden.clone())
        return Seen(hessians, routed, sensitivity)

    def _stored(self, weights: dict[str, Fitted | Stored]) -> dict[str, Stored]:
        """Empties the dict of fits, which are large."""
        return {name: stored(weights.pop(name), self.settings.threads) for name in list(weights)}

    def _advance(self, index: int, module: nn.Module, tensors: dict[str, Stored], hidden: Tensor) -> None:
        """hidden becomes the output of the quantized layer."""
        arch = self.model.checkpoint.arch_of(index)
        arch.install(module, self.effective(arch, tensors, experts=False))
        experts = streamed_experts(module)
        if experts:
            experts.expert = partial(self._effective_expert, arch, tensors, self.stream.activation(index))
        self.stream.forward(module, hidden)

    def _effective_expert(self, arch: Architecture, tensors: dict[str, Stored], act: Any, number: int) -> Expert:
        layer = {}
        for linear in sorted(arch.linears, key=lambda linear: not linear.hadamard):  # first what needs another copy
            experts = tensors[linear.name]
            if isinstance(experts, StoredExperts):
                weight = experts.experts[number].weight(self.settings.threads)
                layer[linear.name] = self.layout(linear).from_file(weight)
                del weight
        return Expert.of(arch, layer, act)

    def effective(self, arch: Architecture, tensors: dict[str, Stored], experts: bool = True) -> Layer:
        """The weights that the file stands for, in transformers' layout; with the experts' or without."""
        n_threads = self.settings.threads
        layer = {spec.name: tensors[spec.name].weight(n_threads) for spec in arch.unquantized}
        for linear in arch.linears:
            if experts or not linear.experts:
                layer[linear.name] = self.layout(linear).from_file(tensors[linear.name].weight(n_threads))
        return layer

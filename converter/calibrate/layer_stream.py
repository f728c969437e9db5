"""Runs a model one decoder layer at a time, with transformers' own layer modules and weights given per layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..source.architecture import Layer
from ..source.checkpoint import Checkpoint
from ..transform.transformed_model import TransformedModel
from .streamed_experts import Expert, Routed, StreamedExperts, streamed_experts

BATCH_TOKENS = 4096


class FoldedLayerNorm(nn.Module):
    """What a LayerNorm computes of a stream without a mean: its RMS norm, plus the bias [n]."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """With the norm's parameters."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., n], like x."""
        out: Tensor = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps) + self.bias
        return out


def batch_size(hidden: Tensor) -> int:
    """Sequences that go through a layer at once."""
    return max(1, BATCH_TOKENS // hidden.shape[1])


class LayerStream:
    """Decoder layers of a checkpoint, materialized one by one; memory holds one layer and the hidden states."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take the skeleton's layers; no weights yet."""
        self.checkpoint = checkpoint
        self.decoder = checkpoint.skeleton.get_decoder()
        self.rotary = type(self.decoder.rotary_emb)(checkpoint.config)
        checkpoint.arch.correct_rope(self.rotary)
        self.eps = checkpoint.config.rms_norm_eps
        self.window = checkpoint.arch.window(checkpoint.config)

    def module(self, index: int, layer: Layer, expert: Callable[[int], Layer] | None = None) -> nn.Module:
        """transformers' decoder layer with these weights; expert: gives those of one, where the layer has none."""
        arch = self.checkpoint.arch_of(index)
        module = copy.deepcopy(self.decoder.layers[index])
        if arch.experts_module and expert:
            module.set_submodule(arch.experts_module, self._streamed(index, expert))
        module = module.to_empty(device="cpu").eval()
        for norm in arch.norms:
            if norm.bias:
                name = norm.parameter.removesuffix(".weight")
                module.set_submodule(name, FoldedLayerNorm(module.get_submodule(name)))
        arch.install(module, layer)
        return module

    def load(self, model: TransformedModel, index: int) -> nn.Module:
        """The module of one of the model's layers, whose experts stay on disk until they are needed."""
        return self.module(index, model.layer(index), partial(model.expert, index))

    def _streamed(self, index: int, expert: Callable[[int], Layer]) -> StreamedExperts:
        arch = self.checkpoint.arch_of(index)
        act, n_experts = self.activation(index), arch.n_experts(self.checkpoint.config)
        return StreamedExperts(n_experts, lambda number: Expert.of(arch, expert(number), act))

    def activation(self, index: int) -> Callable[[Tensor], Tensor]:
        """What the experts of a layer do to their gate."""
        own: Any = self.decoder.layers[index].get_submodule(self.checkpoint.arch_of(index).experts_module)
        act: Callable[[Tensor], Tensor] = own.act_fn
        return act

    def forward(self, module: nn.Module, hidden: Tensor) -> None:
        """Replace hidden [sequences, tokens, hidden_size] by the layer's output, a few sequences at a time."""
        routed = self.without_experts(module, hidden)
        experts = streamed_experts(module)
        if experts and routed:
            experts.add_outputs(routed, hidden.flatten(0, 1))

    def without_experts(self, module: nn.Module, hidden: Tensor) -> Routed | None:
        """Replace hidden by the layer's output without that of streamed experts; returns what these get, if any."""
        arguments = self._arguments(hidden)
        with torch.no_grad():
            for batch in hidden.split(batch_size(hidden)):
                batch.copy_(module(batch, **arguments))
        experts = streamed_experts(module)
        return experts.take() if experts else None

    def call(self, module: nn.Module, hidden: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The layer's output for hidden [sequences, tokens, hidden_size], some parameters replaced; differentiable."""
        out: Tensor = functional_call(module, parameters, (hidden,), self._arguments(hidden))
        return out

    def backward(
        self, module: nn.Module, hidden: Tensor, gradient: Tensor, by_routed: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Replace a loss's gradient [sequences, tokens, hidden_size] by the layer's output by that by its input.

        by_routed: where experts are streamed, the gradients by their states and routing weights of all tokens.
        """
        arguments = self._arguments(hidden)
        module.requires_grad_(False)
        size, experts, begin = batch_size(hidden), streamed_experts(module), 0
        for batch, by_output in zip(hidden.split(size), gradient.split(size), strict=True):
            x = batch.clone().requires_grad_()
            outputs, gradients = [module(x, **arguments)], [by_output]
            if experts and by_routed:
                routed, tokens = experts.take(), slice(begin, begin := begin + x.shape[0] * x.shape[1])
                outputs += [routed.states, routed.weights]
                gradients += [part[tokens] for part in by_routed]
            torch.autograd.backward(outputs, gradients)
            by_output.copy_(x.grad)

    def _arguments(self, hidden: Tensor) -> dict[str, Any]:
        positions = torch.arange(hidden.shape[1])[None]
        rope = self.rotary(hidden, position_ids=positions)
        mask = None  # attention is causal then
        if 0 < self.window < hidden.shape[1]:
            distance = positions.T - positions
            seen = (distance >= 0) & (distance < self.window)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        return {"position_embeddings": rope, "position_ids": positions, "attention_mask": mask}

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final norm without its scale, which the head has taken."""
        return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)

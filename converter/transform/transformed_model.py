"""The float model after the stages that leave its logits unchanged: folded, rotated, permuted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..source.architecture import Architecture, Layer, value_dim_of
from ..source.checkpoint import Checkpoint
from .fold import fold_embedding, fold_final_norm, fold_norms
from .permutation import permute_channels, permute_heads
from .rotation import rotate_heads, rotate_layer


@dataclass(frozen=True)
class TransformedModel:
    """A checkpoint seen through fold, rotations and permutation.

    rotation [hidden, hidden]: of the residual stream; head_rotation [value_dim, value_dim]: of the value heads; None:
    none. permute_block: columns per codebook, 0 for no permutation.
    """

    checkpoint: Checkpoint
    rotation: Tensor | None = None
    head_rotation: Tensor | None = None
    permute_block: int = 0

    def rotated(self, rotation: Tensor, head_rotation: Tensor) -> TransformedModel:
        """The same model with its residual stream and its value heads in other bases."""
        return replace(self, rotation=rotation, head_rotation=head_rotation)

    def _rotate(self, matrix: Tensor) -> Tensor:
        return matrix if self.rotation is None else matrix @ self.rotation

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._rotate(fold_embedding(self.checkpoint.arch, self.checkpoint.embedding()))

    def head(self) -> Tensor:
        """[vocab, hidden]: reads the final norm without its scale, so it is never tied to the embedding."""
        return self._rotate(fold_final_norm(self.checkpoint.head(), self.checkpoint.final_norm()))

    def head_bias(self) -> Tensor | None:
        """[vocab]: the head's own and what it reads of the final norm's; None where the architecture has neither."""
        if self.checkpoint.arch.head_bias is None:
            return None
        return self.checkpoint.head_bias() + self.checkpoint.head() @ self.checkpoint.final_norm_bias()

    def logits(self, normed: Tensor) -> Tensor:
        """[..., vocab] of the final norm's output without its scale, [..., hidden]."""
        logits, bias = normed @ self.head().T, self.head_bias()
        return logits if bias is None else logits + bias

    def layer(self, index: int) -> Layer:
        """All tensors of one decoder layer but the experts'; norm scales are 1."""
        arch, config = self.checkpoint.arch_of(index), self.checkpoint.config
        layer = self._in_basis(arch, self.checkpoint.layer(index))
        if self.head_rotation is not None:
            layer = rotate_heads(arch, layer, self.head_rotation)
        return permute_heads(arch, layer, self.permute_block, value_dim_of(config)) if self.permute_block else layer

    def expert(self, index: int, expert: int) -> Layer:
        """The linears of one expert of a layer."""
        arch = self.checkpoint.arch_of(index)
        layer = self._in_basis(arch, self.checkpoint.expert(index, expert))
        return {linear.name: layer[linear.name] for linear in arch.linears if linear.experts}

    def whole_layer(self, index: int) -> Layer:
        """The layer with the linears of all experts, [n_experts, out, in]."""
        n_experts = self.n_experts(index)
        experts = [self.expert(index, number) for number in range(n_experts)]
        stacks = {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]} if experts else {}
        return self.layer(index) | stacks

    def n_experts(self, index: int) -> int:
        """Of one layer, 0 if it is dense."""
        arch = self.checkpoint.arch_of(index)
        return arch.n_experts(self.checkpoint.config) if arch.experts_module else 0

    def _in_basis(self, arch: Architecture, layer: Layer) -> Layer:
        layer = fold_norms(arch, layer)
        if self.rotation is not None:
            layer = rotate_layer(arch, layer, self.rotation)
        return permute_channels(arch, layer, self.permute_block) if self.permute_block else layer

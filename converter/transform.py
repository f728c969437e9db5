"""The float model after the stages that leave its logits unchanged: folded, rotated, permuted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .architecture import Layer, value_dim_of
from .checkpoint import Checkpoint
from .fold import fold_embedding, fold_final_norm, fold_norms
from .permutation import permute_layer
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
        """The same in other bases."""
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
        """All tensors of one decoder layer; norm scales are 1."""
        arch, config = self.checkpoint.arch_of(index), self.checkpoint.config
        layer = fold_norms(arch, self.checkpoint.layer(index))
        if self.rotation is not None:
            layer = rotate_layer(arch, layer, self.rotation)
        if self.head_rotation is not None:
            layer = rotate_heads(arch, layer, self.head_rotation)
        if self.permute_block:
            layer = permute_layer(arch, layer, self.permute_block, value_dim_of(config))
        return layer

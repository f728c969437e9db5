"""Runs a model one decoder layer at a time, with transformers' own layer modules and weights given per layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .architecture import Layer
from .checkpoint import Checkpoint

BATCH_TOKENS = 4096


class LayerStream:
    """Decoder layers of a checkpoint, materialized one by one; memory holds one layer and the hidden states."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take the skeleton's layers; no weights yet."""
        self.arch = checkpoint.arch
        self.decoder = checkpoint.skeleton.get_decoder()
        self.rotary = type(self.decoder.rotary_emb)(checkpoint.config)
        self.eps = checkpoint.config.rms_norm_eps

    def module(self, index: int, layer: Layer) -> nn.Module:
        """transformers' decoder layer with these weights."""
        module = copy.deepcopy(self.decoder.layers[index]).to_empty(device="cpu").eval()
        self.arch.install(module, layer)
        return module

    def forward(self, module: nn.Module, hidden: Tensor) -> None:
        """Replace hidden [sequences, tokens, hidden_size] by the layer's output, a few sequences at a time."""
        n_tokens = hidden.shape[1]
        positions = torch.arange(n_tokens)[None]
        rope = self.rotary(hidden, position_ids=positions)
        with torch.no_grad():
            for batch in hidden.split(max(1, BATCH_TOKENS // n_tokens)):
                # Without a mask, attention is causal.
                batch.copy_(module(batch, position_embeddings=rope, position_ids=positions, attention_mask=None))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final norm without its scale, which the head has taken."""
        return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)

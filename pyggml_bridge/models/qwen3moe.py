"""GGUF architecture "qwen3moe"."""

from __future__ import annotations

from pyggml_bridge.models.decoder import build_decoder
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    return build_decoder(weights, n_ctx, interleaved_rope=False)

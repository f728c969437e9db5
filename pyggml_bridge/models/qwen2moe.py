"""GGUF architecture "qwen2moe": Qwen1.5-MoE and Qwen2-57B-A14B."""

from __future__ import annotations

from pyggml_bridge.models.decoder import build_decoder
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    normalize: bool = weights.file.get("qwen2moe.expert_weights_norm", bool, False)
    return build_decoder(weights, n_ctx, interleaved_rope=False, normalize_top_k=normalize)

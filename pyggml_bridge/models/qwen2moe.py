"""GGUF architecture "qwen2moe": Qwen1.5-MoE and Qwen2-57B-A14B.

Their queries, keys and values have biases. One more expert is for every token, times the sigmoid of a gate.
"""

from __future__ import annotations

from pyggml_bridge.decoder.builder import DecoderBuilder
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    b = DecoderBuilder.of_file(weights, n_ctx)
    angles = b.rope_angles()
    normalize: bool = weights.file.get(
        "qwen2moe.expert_weights_norm", bool, False
    )  # llama.cpp's files have no such key
    x = b.embed()
    for _ in b.layers():
        q, k, v = b.queries_keys_values(b.norm(x, "attn_norm"))
        b.rope(q, k, angles, interleaved=False)
        b.attention_output(b.attention(q, k, v), add_to=x)
        normed = b.norm(x, "ffn_norm")
        b.experts(normed, b.route(normed, normalize=normalize), add_to=x)
        b.gated_shared_expert(normed, add_to=x)
    return b.finish(x)

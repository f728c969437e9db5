"""GGUF architecture "qwen2": Qwen2 and Qwen2.5. Their queries, keys and values have biases."""

from __future__ import annotations

from pyggml_bridge.decoder.builder import DecoderBuilder
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    b = DecoderBuilder.of_file(weights, n_ctx)
    angles = b.rope_angles()
    x = b.embed()
    for _ in b.layers():
        q, k, v = b.queries_keys_values(b.norm(x, "attn_norm"))
        b.rope(q, k, angles, interleaved=False)
        b.attention_output(b.attention(q, k, v), add_to=x)
        b.dense_ffn(b.norm(x, "ffn_norm"), add_to=x)
    return b.finish(x)

"""GGUF architecture "phimoe": Phi-3.5-MoE and Phi-mini-MoE, as cq-convert writes them.

Their LayerNorms are RMS norms there, since nothing writes the residual stream's mean (converter/transform/fold.py). A
file of llama.cpp's converter holds them as they were and does not say how the router chooses.
"""

from __future__ import annotations

from pyggml_bridge.decoder.builder import DecoderBuilder
from pyggml_bridge.errors import CQError
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights

JITTER = "phimoe.router_jitter_noise"
BIASED = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")  # in every layer, zero or not


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    jitter, window = _jitter_and_window(weights)
    _require_biases(weights)
    b = DecoderBuilder.of_file(weights, n_ctx)
    angles = b.rope_angles()
    x = b.embed()
    for layer in b.layers():
        q, k, v = b.queries_keys_values(b.norm(x, "attn_norm"))
        b.rope(q, k, angles, interleaved=False)
        b.attention_output(b.attention(q, k, v, window=window), add_to=x)
        normed = b.norm(x, "ffn_norm")
        routing = b.program.sparsemixer(b.router_logits(normed), layer, b.h.top_k, jitter)
        b.experts(normed, routing, add_to=x)
    return b.finish(x)


def _jitter_and_window(weights: Weights) -> tuple[float, int]:
    """Of SparseMixer routing; and how many keys attention sees, 0 for all."""
    file = weights.file
    if JITTER not in file.metadata:
        raise CQError(
            f"{file.path}: the key {JITTER} is missing: LayerNorms of files not by cq-convert are not supported"
        )
    jitter: float = file.get(JITTER, float)
    window: int = file.get("phimoe.attention.sliding_window", int, 0)
    if jitter < 0 or window < 0:
        raise CQError(f"{file.path}: router_jitter_noise is {jitter}, attention.sliding_window {window}")
    return jitter, window


def _require_biases(weights: Weights) -> None:
    n_layers: int = weights.file.get("phimoe.block_count", int)
    for name in (*(f"blk.{i}.{stem}" for i in range(n_layers) for stem in BIASED), "output_norm", "output"):
        if not weights.has(f"{name}.bias"):
            raise CQError(f"{weights.file.path}: tensor {name}.bias is missing")

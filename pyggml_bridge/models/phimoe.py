"""GGUF architecture "phimoe": Phi-3.5-MoE and Phi-mini-MoE, as cq-convert writes them.

Their LayerNorms are RMS norms there, since nothing writes the residual stream's mean (converter/fold.py). A file of
llama.cpp's converter holds them as they were and does not say how the router chooses.
"""

from __future__ import annotations

from pyggml_bridge.errors import CQError
from pyggml_bridge.models.decoder import build_decoder
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights

JITTER = "phimoe.router_jitter_noise"
BIASED = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")  # in every layer, zero or not


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    file = weights.file
    if JITTER not in file.metadata:
        raise CQError(
            f"{file.path}: the key {JITTER} is missing: LayerNorms of files not by cq-convert are not supported"
        )
    jitter: float = file.get(JITTER, float)
    window: int = file.get("phimoe.attention.sliding_window", int, 0)
    if jitter < 0 or window < 0:
        raise CQError(f"{file.path}: router_jitter_noise is {jitter}, attention.sliding_window {window}")
    n_layers: int = file.get("phimoe.block_count", int)
    for name in (*(f"blk.{i}.{stem}" for i in range(n_layers) for stem in BIASED), "output_norm", "output"):
        if not weights.has(f"{name}.bias"):
            raise CQError(f"{file.path}: tensor {name}.bias is missing")
    return build_decoder(weights, n_ctx, interleaved_rope=False, jitter=jitter, window=window)

"""GGUF architecture "deepseek2": DeepSeek-V2, with latent attention over a compressed KV cache (arXiv 2405.04434).

A token's keys and values of all heads are linear in one latent vector, so the cache holds only that and one key for
rope, shared by all heads. Queries go over into the latent space (attn_k_b), where all heads attend as to one KV head
whose values are the latents; each head's own attn_v_b follows on the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.decoder.builder import DecoderBuilder
from pyggml_bridge.decoder.hparams import MAX_DIMENSION, HParams
from pyggml_bridge.decoder.rope import rope_table
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import Value
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Weights

SOFTMAX = 1  # llama.cpp's expert_gating_func
MAX_GROUPS = 64  # native/include/cq.h


@dataclass(frozen=True)
class Latent:
    """Widths of the attention.

    q_rank 0: queries without a latent; nope, rope: columns of a query head; value: of a head's output; scale: of the
    scores.
    """

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    scale: float


def build(weights: Weights, n_ctx: int) -> Program:
    """Record the forward pass for up to n_ctx positions."""
    h, n_dense = _hparams(weights)
    a = _latent(weights, h)
    normalize: bool = weights.file.get(f"{h.arch}.expert_weights_norm", bool, False)
    program = Program(n_ctx, h.n_layers, 1, a.kv_rank + a.rope, h.vocab_size, weights.activation_bits)
    b = DecoderBuilder(program, weights, h)
    angles = rope_table(weights, h.arch, n_ctx, a.rope, yarn=True)
    x = b.embed()
    for layer in b.layers():
        b.attention_output(_attention(b, a, b.norm(x, "attn_norm"), angles), add_to=x)
        normed = b.norm(x, "ffn_norm")
        if layer < n_dense or not h.n_experts:
            b.dense_ffn(normed, add_to=x)
            continue
        b.experts(normed, b.route(normed, normalize=normalize), add_to=x)
        if h.shared_ffn_width:
            b.shared_expert(normed, add_to=x)
    return b.finish(x)


def _attention(b: DecoderBuilder, a: Latent, normed: Value, angles: NDArray[np.float32]) -> Value:
    """The heads' outputs [tokens, n_heads * value]."""
    p, n_heads, width = b.program, b.h.n_heads, a.kv_rank + a.rope
    q = _queries(b, a, normed)
    p.rope(q, a.nope + a.rope, angles, interleaved=True, first=a.nope)
    nope = p.copy_columns(q, 0, a.nope, n_heads)
    query = Value(n_heads * width)
    p.copy_columns(p.linear(nope, b.matrix("attn_k_b", a.kv_rank, a.nope, n_heads)), 0, a.kv_rank, n_heads, to=query)
    p.copy_columns(q, a.nope, a.rope, n_heads, to=query, at=a.kv_rank)

    key = b.projection(normed, "attn_kv_a_mqa", width)
    p.rope(key, width, angles, interleaved=True, first=a.kv_rank)
    latent = b.norm(p.copy_columns(key, 0, a.kv_rank), "attn_kv_a_norm")
    p.copy_columns(latent, 0, a.kv_rank, to=key)

    attended = p.latent_attention(b.layer, query, key, a.kv_rank, scale=a.scale)
    return p.linear(attended, b.matrix("attn_v_b", a.value, a.kv_rank, n_heads))


def _queries(b: DecoderBuilder, a: Latent, normed: Value) -> Value:
    """Queries [tokens, n_heads * (nope + rope)]."""
    n_out = b.h.n_heads * (a.nope + a.rope)
    if not a.q_rank:
        return b.projection(normed, "attn_q", n_out)
    low = b.norm(b.projection(normed, "attn_q_a", a.q_rank), "attn_q_a_norm")
    return b.projection(low, "attn_q_b", n_out)


# ---- metadata ----


def _get_int(weights: Weights, h: HParams, key: str, default: int | None = None) -> int:
    value: int = weights.file.get(f"{h.arch}.{key}", int, ... if default is None else default)
    if not 0 <= value <= MAX_DIMENSION:
        raise CQError(f"{weights.file.path}: the key {h.arch}.{key} is {value}")
    return value


def _hparams(weights: Weights) -> tuple[HParams, int]:
    """Dimensions, and how many layers at the start have a dense FFN."""
    file, h = weights.file, HParams.read(weights)
    if _get_int(weights, h, "expert_gating_func", SOFTMAX) != SOFTMAX:
        raise CQError(f"{file.path}: experts chosen otherwise than by a softmax are not supported")
    if any(name.endswith(".exp_probs_b.bias") for name in file.tensors):
        raise CQError(f"{file.path}: a bias for the choice of experts (exp_probs_b) is not supported")
    scale: float = file.get(f"{h.arch}.expert_weights_scale", float, 1.0)
    shared = _get_int(weights, h, "expert_shared_count", 0) * h.expert_ffn_width
    h = replace(h, shared_ffn_width=shared, expert_scale=scale, expert_groups=_groups(weights, h))
    return h, _get_int(weights, h, "leading_dense_block_count", 0)


def _groups(weights: Weights, h: HParams) -> tuple[int, int]:
    """Groups of experts, and from how many of them a token's may come (0: from all)."""
    n_groups = _get_int(weights, h, "expert_group_count", 1)
    if n_groups <= 1:
        return 1, 0
    used = _get_int(weights, h, "expert_group_used_count", n_groups)
    fits = n_groups <= MAX_GROUPS and h.n_experts % n_groups == 0 and 1 <= used <= n_groups
    if not fits or used * (h.n_experts // n_groups) < h.top_k:
        raise CQError(
            f"{weights.file.path}: {h.top_k} of {h.n_experts} experts, of {used} of {n_groups} groups, are impossible"
        )
    return n_groups, used


def _latent(weights: Weights, h: HParams) -> Latent:
    """The attention's widths; CQError where the keys contradict each other."""
    rank, query = _get_int(weights, h, "attention.kv_lora_rank"), _get_int(weights, h, "attention.key_length_mla")
    value = _get_int(weights, h, "attention.value_length_mla")
    if (
        (h.n_kv_heads, h.head_dim, h.value_dim) != (1, rank + h.n_rot, rank)
        or query <= h.n_rot
        or not rank
        or not value
    ):
        raise CQError(
            f"{weights.file.path}: {h.n_kv_heads} KV heads of widths {h.head_dim} and {h.value_dim} for a latent of"
            f" {rank}, rope over {h.n_rot}, heads of {query} and {value}: not a compressed KV cache"
        )
    q_rank = _get_int(weights, h, "attention.q_lora_rank", 0)
    return Latent(q_rank, rank, query - h.n_rot, h.n_rot, value, _score_scale(weights, h, query))


def _score_scale(weights: Weights, h: HParams, query: int) -> float:
    """query^-1/2, times the square of yarn's correction for longer contexts."""
    factor: float = weights.file.get(f"{h.arch}.rope.scaling.factor", float, 1.0)
    multiplier: float = weights.file.get(f"{h.arch}.rope.scaling.yarn_log_multiplier", float, 0.0)
    return float(query**-0.5 * (1 + multiplier * math.log(max(factor, 1.0))) ** 2)

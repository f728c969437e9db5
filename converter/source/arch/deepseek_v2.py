"""DeepSeek-V2: latent attention (arXiv 2405.04434); dense FFNs first, then experts and shared experts without a gate.

kv_b_proj expands a latent vector to the keys and values of all heads. llama.cpp's files hold it in two, per head:
attn_v_b, and attn_k_b transposed, which takes queries to the latent space instead of keys out of it. The norms of the
latents are no norms of the residual stream, so their scales stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from pyggml_bridge.errors import CQError

from .. import blocks
from ..architecture import Architecture, HeadGroup, HParams, Linear, Vector
from ..rope import rope_hparams, yarn_hparams

LATENT_EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is: llama.cpp's files have one for all norms
GATING_SOFTMAX = 1  # llama.cpp's expert_gating_func
GROUP_METHODS = ("greedy", "group_limited_greedy")


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, mlp_bias=False, rms_norm_eps=LATENT_EPS)
    blocks.require(config, num_key_value_heads=config.num_attention_heads)
    # transformers computes the weights as they are, as DeepSeek's released models do
    blocks.require(config, norm_topk_prob=False, scoring_func="softmax", moe_layer_freq=1)
    if config.topk_method not in GROUP_METHODS:
        raise CQError(
            f"deepseek_v2: topk_method = {config.topk_method!r} is not supported (only {' or '.join(GROUP_METHODS)})"
        )
    if not 1 <= (config.num_experts_per_tok or 0) <= config.n_routed_experts:
        raise CQError(f"deepseek_v2: num_experts_per_tok = {config.num_experts_per_tok!r} is not supported")
    if not config.n_shared_experts:
        raise CQError(f"deepseek_v2: n_shared_experts = {config.n_shared_experts!r} is not supported")
    _check_groups(config)
    _rope(config)


def _check_groups(config: Any) -> None:
    if config.topk_method == "greedy":
        return
    n_groups, used, n_experts = config.n_group or 0, config.topk_group or 0, config.n_routed_experts
    fits = 1 <= used <= n_groups <= 64 and n_experts % n_groups == 0
    if not fits or used * (n_experts // n_groups) < config.num_experts_per_tok:
        raise CQError(
            f"deepseek_v2: n_group = {config.n_group!r}, topk_group = {config.topk_group!r} are not supported for"
            f" {config.num_experts_per_tok} of {n_experts} experts"
        )


def _rope(config: Any) -> HParams:
    if config.rope_parameters["rope_type"] == "yarn":
        return yarn_hparams(config)
    if config.rope_parameters.get("mscale_all_dim"):
        raise CQError(f"deepseek_v2: mscale_all_dim = {config.rope_parameters['mscale_all_dim']} without yarn")
    return rope_hparams(config)


def _attention(config: Any) -> tuple[Linear, ...]:
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    q_low = config.q_lora_rank is not None
    input_name = "self_attn.q_a_proj" if q_low else "self_attn.q_proj"
    queries = (
        Linear("attn_q_a" if q_low else "attn_q", f"{input_name}.weight", input_name, "attn_norm"),
        *([Linear("attn_q_b", "self_attn.q_b_proj.weight", "self_attn.q_b_proj")] if q_low else []),
    )

    def key_rows(kv_b: Tensor) -> Tensor:
        """[heads, kv_lora_rank, nope]: of each head's row block the first rows, transposed."""
        return kv_b.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2)

    def value_rows(kv_b: Tensor) -> Tensor:
        """[heads, v_head_dim, kv_lora_rank]: of each head's row block the last rows."""
        return kv_b.unflatten(0, (heads, -1))[:, nope:]

    kv_b = ("self_attn.kv_b_proj.weight", "self_attn.kv_b_proj")
    return (
        *queries,
        Linear("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa.weight", input_name, "attn_norm", sensitive=True),
        Linear("attn_k_b", *kv_b, view=key_rows, q8_0=True),
        Linear("attn_v_b", *kv_b, view=value_rows, q8_0=True),
        Linear("attn_output", "self_attn.o_proj.weight", "self_attn.o_proj", writes_residual=True),
    )


def _vectors(config: Any) -> tuple[Vector, ...]:
    keys = Vector("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight")
    if config.q_lora_rank is None:
        return (keys,)
    return Vector("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"), keys


def by_layer(config: Any, layer: int) -> Architecture:
    """Attention with or without a latent for the queries; a dense FFN in the first layers."""
    attention, vectors = _attention(config), _vectors(config)
    if layer < config.first_k_dense_replace:
        linears = (*attention, *blocks.dense_ffn("ffn_norm"))
        return replace(ARCHITECTURE, vectors=vectors, linears=linears, channels=(blocks.FFN_CHANNELS,))
    experts = blocks.experts("ffn_norm", "mlp", ("gate_proj", "up_proj", "down_proj"))
    shared = blocks.shared_expert("ffn_norm", "mlp.shared_experts")
    return replace(ARCHITECTURE, vectors=vectors, linears=(*attention, *experts, *shared))


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a DeepSeek-V2 model, below `deepseek2.`: one KV head as wide as the compressed cache."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    keys: HParams = {
        **blocks.dimensions(config),
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + rope,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank or 0,  # llama.cpp asks for it but with V2-Lite's number of layers
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        **_rope(config),
        **blocks.expert_hparams(config, config.n_routed_experts),
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": False,
        "expert_gating_func": GATING_SOFTMAX,
    }
    if config.topk_method == "group_limited_greedy":
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return keys


ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    gguf_name="deepseek2",
    norms=blocks.NORMS,
    linears=(),
    channels=(blocks.EXPERT_CHANNELS, blocks.SHARED_EXPERT_CHANNELS),
    heads=HeadGroup("attn_v_b", "attn_output"),
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.n_routed_experts if config.first_k_dense_replace < config.num_hidden_layers else 0,
    by_layer=by_layer,
)

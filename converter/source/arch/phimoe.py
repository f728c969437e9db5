"""Phi-MoE (Phi-3.5-MoE, Phi-mini-MoE): LayerNorms, biases in attention, SparseMixer routing, longrope, a window.

Biases that the configuration leaves out are written as zeros: llama.cpp's layout has all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyggml_bridge.errors import CQError

from .. import blocks
from ..architecture import Architecture, HParams, Linear, Norm, Vector
from ..rope import longrope_hparams, rope_hparams

NORMS = (
    Norm("attn_norm", "input_layernorm.weight", bias="attn_norm.bias"),
    Norm("ffn_norm", "post_attention_layernorm.weight", bias="ffn_norm.bias"),
)

VECTORS = (
    Vector("attn_norm.bias", "input_layernorm.bias", residual=True),
    Vector("ffn_norm.bias", "post_attention_layernorm.bias", residual=True),
    *(Vector(f"attn_{x}.bias", f"self_attn.{x}_proj.bias", switch="attention_bias") for x in "qkv"),
    Vector("attn_output.bias", "self_attn.o_proj.bias", switch="attention_bias", residual=True),
)

ATTENTION: tuple[Linear, ...] = tuple(
    replace(linear, bias=f"{linear.name}.bias") for linear in blocks.attention("attn_norm")
)


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", num_experts_per_tok=2)  # transformers' SparseMixer always chooses two
    if config.num_local_experts < 2:
        raise CQError(f"phimoe: num_local_experts = {config.num_local_experts} is not supported (at least 2)")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise CQError(f"phimoe: sliding_window = {config.sliding_window} is not supported (at least 1)")
    _rope_hparams(config)


def _rope_hparams(config: Any) -> HParams:
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "longrope"):
        raise CQError(f"phimoe: rope_type = {kind!r} is not supported (only default, longrope)")
    return longrope_hparams(config) if kind == "longrope" else rope_hparams(config)


def correct_rope(rotary: torch.nn.Module) -> None:
    """Let transformers' rotary embedding use the long factors in long sequences.

    Its forward computes the frequencies anew from the short ones, whatever the length; those that fit the length are in
    the buffer that its decorator has just filled.
    """
    own: Any = rotary
    if own.rope_type == "longrope":
        own.rope_init_fn = lambda config: (own.inv_freq, own.attention_scaling)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Phi-MoE model, below `phimoe.`; it does not read router_jitter_noise, cq-run does."""
    window: HParams = {"attention.sliding_window": config.sliding_window} if config.sliding_window else {}
    return {
        **blocks.dimensions(config),
        **blocks.expert_hparams(config, config.num_local_experts),
        **_rope_hparams(config),
        **window,
        "router_jitter_noise": float(config.router_jitter_noise),
    }


ARCHITECTURE = Architecture(
    model_type="phimoe",
    gguf_name="phimoe",
    norms=NORMS,
    vectors=VECTORS,
    linears=(*ATTENTION, *blocks.experts("ffn_norm", "block_sparse_moe", ("w1", "w3", "w2"), router="mlp.router")),
    channels=(blocks.EXPERT_CHANNELS,),
    heads=blocks.BIASED_VALUE_HEADS,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_local_experts,
    head_bias="lm_head_bias",
    window=lambda config: config.sliding_window or 0,
    correct_rope=correct_rope,
)

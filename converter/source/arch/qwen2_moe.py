"""Qwen2-MoE: Qwen2's attention; beside the routed experts one for every token, times the sigmoid of a gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import ChannelGroup, HParams, Linear
from ..rope import rope_hparams
from . import llama, mixtral, qwen2, qwen3_moe


def shared_expert(module: str) -> tuple[Linear, ...]:
    """The linears of the expert that every token goes to; module: its name in transformers' layer."""
    return (
        Linear("ffn_gate_shexp", f"{module}.gate_proj.weight", f"{module}.gate_proj", "ffn_norm"),
        Linear("ffn_up_shexp", f"{module}.up_proj.weight", f"{module}.gate_proj", "ffn_norm"),
        Linear(
            "ffn_down_shexp",
            f"{module}.down_proj.weight",
            f"{module}.down_proj",
            writes_residual=True,
            hadamard=True,
        ),
    )


SHARED_CHANNELS = ChannelGroup(("ffn_gate_shexp", "ffn_up_shexp"), "ffn_down_shexp")
GATE = Linear("ffn_gate_inp_shexp", "mlp.shared_expert_gate.weight", "mlp.shared_expert_gate", "ffn_norm", float32=True)


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, hidden_act="silu", qkv_bias=True, use_sliding_window=False)
    llama.require(config, decoder_sparse_step=1, mlp_only_layers=[])
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen2-MoE model, below `qwen2moe.`; it does not read expert_weights_norm, cq-run does."""
    return {
        **qwen3_moe.hparams(config),
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_weights_norm": config.norm_topk_prob,
    }


ARCHITECTURE = replace(
    mixtral.ARCHITECTURE,
    model_type="qwen2_moe",
    gguf_name="qwen2moe",
    vectors=qwen2.ARCHITECTURE.vectors,
    linears=(*qwen2.ATTENTION, *qwen3_moe.MOE, GATE, *shared_expert("mlp.shared_expert")),
    channels=(*mixtral.CHANNELS, SHARED_CHANNELS),
    heads=qwen2.ARCHITECTURE.heads,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
)

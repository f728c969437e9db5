"""Qwen3-MoE: Qwen3's attention, Mixtral's routing over many narrow experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import HParams
from . import llama, mixtral, qwen2, qwen3

MOE = mixtral.moe("mlp.gate.weight", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    qwen3.check(config)
    llama.require(config, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen3-MoE model, below `qwen3moe.`."""
    return {
        **llama.hparams(config),
        **mixtral.expert_hparams(config, config.num_experts),
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


ARCHITECTURE = replace(
    mixtral.ARCHITECTURE,
    model_type="qwen3_moe",
    gguf_name="qwen3moe",
    vectors=qwen3.HEAD_NORMS,
    linears=qwen2.ATTENTION + MOE,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
)

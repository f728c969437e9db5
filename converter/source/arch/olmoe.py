"""OLMoE: RMS norms over all queries and all keys, softmax routing whose weights are not renormalized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import HParams
from ..rope import rope_hparams
from . import llama, mixtral, qwen3_moe


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, hidden_act="silu", attention_bias=False, clip_qkv=None, norm_topk_prob=False)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of an OLMoE model, below `olmoe.`."""
    return {**llama.hparams(config), **mixtral.expert_hparams(config, config.num_experts)}


ARCHITECTURE = replace(
    qwen3_moe.ARCHITECTURE, model_type="olmoe", gguf_name="olmoe", check=check, hparams=hparams
)  # norms of queries and keys by qwen3's names, here [heads * head_dim]

"""Qwen3: Llama with an RMS norm over each query and key head."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, sliding_window=None)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen3 model, below `qwen3.`."""
    return blocks.dimensions(config) | rope_hparams(config)


ARCHITECTURE = Architecture(
    model_type="qwen3",
    gguf_name="qwen3",
    norms=blocks.NORMS,
    vectors=blocks.QK_NORMS,
    linears=(*blocks.attention("attn_norm"), *blocks.dense_ffn("ffn_norm")),
    channels=(blocks.FFN_CHANNELS,),
    heads=blocks.VALUE_HEADS,
    check=check,
    hparams=hparams,
)

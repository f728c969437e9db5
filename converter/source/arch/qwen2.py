"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", sliding_window=None)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen2 model, below `qwen2.`."""
    return blocks.dimensions(config) | rope_hparams(config)


ARCHITECTURE = Architecture(
    model_type="qwen2",
    gguf_name="qwen2",
    norms=blocks.NORMS,
    vectors=blocks.QKV_BIASES,
    linears=(*blocks.attention("attn_norm"), *blocks.dense_ffn("ffn_norm")),
    channels=(blocks.FFN_CHANNELS,),
    heads=blocks.BIASED_VALUE_HEADS,
    check=check,
    hparams=hparams,
)

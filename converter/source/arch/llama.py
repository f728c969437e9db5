"""Llama: RMS norms, grouped-query attention, SwiGLU."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Llama model, below `llama.`."""
    return blocks.dimensions(config) | rope_hparams(config)


ARCHITECTURE = Architecture(
    model_type="llama",
    gguf_name="llama",
    norms=blocks.NORMS,
    linears=(*blocks.attention("attn_norm", rope_pairs=True), *blocks.dense_ffn("ffn_norm")),
    channels=(blocks.FFN_CHANNELS,),
    heads=blocks.VALUE_HEADS,
    check=check,
    hparams=hparams,
    gguf_input=True,
)

"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import Architecture, ChannelGroup, HeadGroup, Linear, Vector
from ..rope import rope_hparams
from . import llama

BIASES = tuple(Vector(f"attn_{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv")

# llama.cpp keeps the rows of this family in transformers' order: rope on halves.
ATTENTION: tuple[Linear, ...] = tuple(replace(linear, rope_heads=None) for linear in llama.ATTENTION)


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, hidden_act="silu", sliding_window=None)
    rope_hparams(config)


ARCHITECTURE = Architecture(
    model_type="qwen2",
    gguf_name="qwen2",
    norms=llama.NORMS,
    vectors=BIASES,
    linears=ATTENTION + llama.FFN,
    channels=ChannelGroup(("ffn_gate", "ffn_up"), "ffn_down"),
    heads=HeadGroup("attn_v", "attn_output", bias="attn_v.bias"),
    check=check,
    hparams=llama.hparams,
    gguf_input=False,
)

"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import HeadGroup, Linear, Vector
from ..rope import rope_hparams
from . import llama

# llama.cpp keeps the rows of this family in transformers' order: rope on halves.
ATTENTION: tuple[Linear, ...] = tuple(replace(linear, rope_heads=None) for linear in llama.ATTENTION)


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, hidden_act="silu", sliding_window=None)
    rope_hparams(config)


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    model_type="qwen2",
    gguf_name="qwen2",
    vectors=tuple(Vector(f"attn_{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv"),
    linears=ATTENTION + llama.FFN,
    heads=HeadGroup("attn_v", "attn_output", bias="attn_v.bias"),
    check=check,
    gguf_input=False,
)

"""Qwen3: Llama with an RMS norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import Vector
from . import llama, qwen2

# Between projection and rope, shared by all heads: their scales cannot be folded into rows that rope mixes.
HEAD_NORMS = tuple(Vector(f"attn_{x}_norm.weight", f"self_attn.{x}_norm.weight") for x in "qk")


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, attention_bias=False)
    qwen2.check(config)


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    model_type="qwen3",
    gguf_name="qwen3",
    vectors=HEAD_NORMS,
    linears=qwen2.ATTENTION + llama.FFN,
    check=check,
    gguf_input=False,
)

"""Mistral without a sliding window: Llama."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import llama


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.check(config)
    llama.require(config, sliding_window=None)


ARCHITECTURE = replace(llama.ARCHITECTURE, model_type="mistral", check=check, gguf_input=False)

"""Rope scaling as llama.cpp's converter writes it: keys for linear scaling, a tensor of factors for llama3."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError

from .architecture import HParams, head_dim_of


def rope_hparams(config: Any) -> HParams:
    """GGUF rope keys below `<arch>.`; CQError for a rope type that is not supported."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise CQError(f"{config.model_type}: rope_type = {kind!r} is not supported (only default, linear, llama3)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CQError(f"{config.model_type}: partial_rotary_factor = {rope['partial_rotary_factor']} is not supported")
    keys: HParams = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return keys


def rope_freqs(config: Any) -> NDArray[np.float32] | None:
    """rope_freqs.weight [head_dim / 2]: what each frequency is divided by; None unless the rope type is llama3."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim = head_dim_of(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

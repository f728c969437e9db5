"""Rope scaling as llama.cpp's converter writes it: keys, and tensors of factors for llama3 and longrope."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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


def yarn_hparams(config: Any) -> HParams:
    """GGUF rope keys of DeepSeek's yarn, below `<arch>.`; CQError for a field that is not supported.

    attn_factor: what cos and sin are multiplied by, 1 where mscale is mscale_all_dim as in DeepSeek's own models.
    llama.cpp takes it for 1 here, cq-run reads it.
    """
    rope = config.rope_parameters
    for field, only in (("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(field, only) != only:
            raise CQError(f"{config.model_type}: {field} = {rope[field]} is not supported (only {only})")
    if not rope.get("factor") or not rope.get("original_max_position_embeddings"):
        raise CQError(f"{config.model_type}: yarn without factor or original_max_position_embeddings is not supported")
    keys: HParams = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }
    if rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    if attention_factor != 1:
        keys["rope.scaling.attn_factor"] = float(attention_factor)
    return keys


def longrope_hparams(config: Any) -> HParams:
    """GGUF rope keys below `<arch>.` of Phi-MoE's longrope; llama.cpp reads the first of its two attention factors."""
    rope, n_pairs = config.rope_parameters, head_dim_of(config) // 2
    for field in ("short_factor", "long_factor"):
        if len(rope[field]) != n_pairs or min(rope[field]) <= 0:
            raise CQError(f"{config.model_type}: {field} = {rope[field]} is not supported (only {n_pairs} above 0)")
    return {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.attn_factor": float(rope["short_mscale"]),
        "rope.scaling.attn_factor_long": float(rope["long_mscale"]),
    }


def rope_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Name in the file -> what each frequency is divided by [head_dim / 2]: for llama3, and two for longrope."""
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.array(rope[field], np.float32) for name, field in names.items()}
    return {"rope_freqs.weight": _llama3_factors(config)} if rope["rope_type"] == "llama3" else {}


def _llama3_factors(config: Any) -> NDArray[np.float32]:
    rope = config.rope_parameters
    head_dim = head_dim_of(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

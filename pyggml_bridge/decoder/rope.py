"""Tables for rotary position embedding (arXiv 2104.09864) and its scalings, computed once per session."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.program import LongRope
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights


def rope_table(weights: Weights, arch: str, n_ctx: int, n_rot: int, *, yarn: bool = False) -> NDArray[np.float32]:
    """cos and sin of every position's angles: float32 [n_ctx, n_rot / 2, 2], from the file's rope.* keys.

    Angles are float32 products of position and inverse frequency, as transformers computes them. rope_freqs.weight,
    where present, divides the frequencies (llama.cpp's encoding of llama3 scaling). yarn: scaling by it is understood.
    """
    file = weights.file
    base: float = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    if base <= 0 or n_rot % 2 or n_rot < 2:
        raise CQError(f"{file.path}: rope with base {base} over {n_rot} dimensions")
    inverse = np.float32(1) / np.float32(base) ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    kind: str = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "linear":
        inverse /= np.float32(file.get(f"{arch}.rope.scaling.factor", float))
    elif kind == "yarn" and yarn:
        inverse = _yarn_frequencies(file, arch, base, inverse)
    elif kind != "none":
        raise CQError(f"{file.path}: the key {arch}.rope.scaling.type is {kind!r}, which this runner does not compute")
    if weights.has("rope_freqs.weight"):
        inverse = inverse / weights.vector("rope_freqs.weight", n_rot // 2)
    scale: float = file.get(f"{arch}.rope.scaling.attn_factor", float, 1.0) if kind == "yarn" else 1.0
    return _cos_sin(inverse, n_ctx, scale)


def long_rope(weights: Weights, arch: str, n_ctx: int, n_rot: int) -> LongRope:
    """LongRoPE (arXiv 2402.13753): rope_factors_short.weight and rope_factors_long.weight divide the frequencies.

    The long ones belong to sequences of more than rope.scaling.original_context_length tokens. cos and sin come times
    rope.scaling.attn_factor and, for those, attn_factor_long: Phi-MoE's, which llama.cpp does not know.
    """
    file, prefix = weights.file, f"{arch}.rope.scaling"
    base: float = file.get(f"{arch}.rope.freq_base", float)
    original: int = file.get(f"{prefix}.original_context_length", int)
    if base <= 0 or n_rot % 2 or n_rot < 2 or original < 1:
        raise CQError(f"{file.path}: longrope with base {base} over {n_rot} dimensions, {original} tokens at first")
    powers: NDArray[np.float32] = np.float32(base) ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    scale: float = file.get(f"{prefix}.attn_factor", float)
    long_scale: float = file.get(f"{prefix}.attn_factor_long", float, scale)

    def table(name: str, factor: float, n: int) -> NDArray[np.float32]:
        factors = weights.vector(f"rope_factors_{name}.weight", n_rot // 2)
        if (factors <= 0).any():
            raise CQError(f"{file.path}: tensor rope_factors_{name}.weight has values that are not positive")
        inverse: NDArray[np.float32] = np.float32(1) / (factors * powers)
        return _cos_sin(inverse, n, factor)

    short, long = table("short", scale, min(original, n_ctx)), table("long", long_scale, n_ctx)
    return LongRope(np.concatenate([short, long[len(short) :]]), short, long[: len(short)])


def _cos_sin(inverse: NDArray[np.float32], n_ctx: int, scale: float) -> NDArray[np.float32]:
    angles = np.arange(n_ctx, dtype=np.float32)[:, None] * inverse[None, :].astype(np.float32)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * np.float32(scale)
    return np.ascontiguousarray(table, dtype=np.float32)


def _yarn_frequencies(file: GGUFFile, arch: str, base: float, inverse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse frequencies [n_rot / 2] for a context `factor` times as long (arXiv 2309.00071).

    What turns more than beta_fast times within the original context stays, what turns less than beta_slow times is
    slowed down by the factor; between them a linear ramp over the dimensions.
    """
    factor: float = file.get(f"{arch}.rope.scaling.factor", float)
    original: int = file.get(f"{arch}.rope.scaling.original_context_length", int)
    fast: float = file.get(f"{arch}.rope.scaling.yarn_beta_fast", float, 32.0)
    slow: float = file.get(f"{arch}.rope.scaling.yarn_beta_slow", float, 1.0)
    if factor <= 0 or original < 1 or fast <= 0 or slow <= 0 or base <= 1:
        raise CQError(f"{file.path}: yarn by {factor} from {original} positions, betas {fast} and {slow}, base {base}")
    n_rot = 2 * len(inverse)

    def dimension(turns: float) -> float:
        return n_rot * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), n_rot - 1)
    ramp = np.clip((np.arange(len(inverse), dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    slowed: NDArray[np.float32] = inverse / np.float32(factor) * ramp + inverse * (1 - ramp)
    return slowed.astype(np.float32)

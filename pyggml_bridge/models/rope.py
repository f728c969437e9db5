"""Tables for rotary position embedding (arXiv 2104.09864) and its scalings, computed once per session."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.weights import Weights


def rope_table(weights: Weights, arch: str, n_ctx: int, n_rot: int) -> NDArray[np.float32]:
    """cos and sin of every position's angles: float32 [n_ctx, n_rot / 2, 2], from the file's rope.* keys.

    Angles are float32 products of position and inverse frequency, as transformers computes them. rope_freqs.weight,
    where present, divides the frequencies (llama.cpp's encoding of llama3 scaling).
    """
    file = weights.file
    base: float = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    if base <= 0 or n_rot % 2 or n_rot < 2:
        raise CQError(f"{file.path}: rope with base {base} over {n_rot} dimensions")
    inverse = np.float32(1) / np.float32(base) ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    kind: str = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "linear":
        inverse /= np.float32(file.get(f"{arch}.rope.scaling.factor", float))
    elif kind != "none":
        raise CQError(f"{file.path}: the key {arch}.rope.scaling.type is {kind!r}, which this runner does not compute")
    if weights.has("rope_freqs.weight"):
        inverse = inverse / weights.vector("rope_freqs.weight", n_rot // 2)
    angles = np.arange(n_ctx, dtype=np.float32)[:, None] * inverse[None, :].astype(np.float32)
    return np.ascontiguousarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), dtype=np.float32)

"""The KV cache: keys and values of past positions, float16; keys alone where the values are columns of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError


def cache_bytes(n_layers: int, n_kv_heads: int, n_ctx: int, head_dim: int, *, has_values: bool) -> int:
    """Bytes of a KVCache of these dimensions once all of its positions are used."""
    return 2 * n_layers * n_kv_heads * n_ctx * head_dim * (2 if has_values else 1)


class KVCache:
    """k, v: float16 bits as uint16 [n_layers, n_kv_heads, n_ctx, head_dim]; pages are committed as they are written."""

    def __init__(self, n_layers: int, n_kv_heads: int, n_ctx: int, head_dim: int, *, has_values: bool = True) -> None:
        """Reserve the cache; CQError if the machine cannot."""
        shape = (n_layers, n_kv_heads, n_ctx, head_dim)
        try:
            self.k: NDArray[np.uint16] = np.zeros(shape, np.uint16)
            self.v: NDArray[np.uint16] | None = np.zeros(shape, np.uint16) if has_values else None
        except (MemoryError, ValueError) as error:
            raise CQError(f"no memory for a KV cache of {n_ctx} positions: try a smaller --ctx") from error

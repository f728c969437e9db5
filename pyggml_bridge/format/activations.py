"""The NumPy oracle for what happens to a linear layer's input at run time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hadamard(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Each block of columns of x [..., n] times the orthonormal Hadamard matrix of Sylvester, its own inverse.

    block: a power of two that divides n. In log2(block) steps of sums and differences, as the kernels do it: no BLAS,
    whose sums need not be the same twice.
    """
    columns = np.array(x.reshape(-1, block).T, np.float32, order="C")
    half = 1
    while half < block:
        low, high = columns.reshape(-1, 2, half, columns.shape[1]).swapaxes(0, 1)
        difference = low - high
        low += high
        high[:] = difference
        half *= 2
    return (columns.T * np.float32(1 / block**0.5)).reshape(x.shape)


def quantize_activations(x: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The run-time quantizer: x [tokens, cols] -> (q int8, scales float32 [tokens]), symmetric per token.

    scale = max|x| / (127 or 7); q = x * (1 / scale) rounded half to even, all in float32. A row of zeros has scale 0.
    """
    top = np.float32((1 << (bits - 1)) - 1)
    scales = (np.abs(x).max(axis=-1) / top).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.clip(np.rint(x * inverse[..., None]), -top, top).astype(np.int8)
    return q, scales

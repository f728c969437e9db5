"""How the file lays out a linear: llama.cpp's row order for rope, Hadamard transforms of blocks of input columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyggml_bridge.format import hadamard

from ..source.architecture import Linear, interleave_rope, split_rope

PIECE = 1 << 20  # elements that are transformed at a time: the transform takes several copies of them


def hadamard_blocks(x: Tensor, block: int) -> Tensor:
    """format.hadamard of x [..., n]; block 0: x itself."""
    if not block:
        return x
    out, rows = torch.empty(x.shape), max(1, PIECE // x.shape[-1])
    pieces = (t.reshape(-1, x.shape[-1]).split(rows) for t in (x, out))
    for piece, transformed in zip(*pieces, strict=True):
        transformed.copy_(torch.from_numpy(hadamard(piece.numpy(), block)))
    return out


@dataclass(frozen=True)
class WeightLayout:
    """Changes of a weight's rows and columns between transformers' layer and the file; both are orthogonal.

    rope_heads: heads whose rows go from rope's halves to pairs, 0 for none; hadamard: columns per block, 0 for none.
    """

    rope_heads: int = 0
    hadamard: int = 0

    def to_file(self, weight: Tensor) -> Tensor:
        """A weight [..., out, in] of transformers' layer as the file holds it."""
        rows = interleave_rope(weight, self.rope_heads) if self.rope_heads else weight
        return hadamard_blocks(rows, self.hadamard)

    def from_file(self, weight: Tensor) -> Tensor:
        """Inverse of to_file."""
        rows = split_rope(weight, self.rope_heads) if self.rope_heads else weight
        return hadamard_blocks(rows, self.hadamard)

    def columns(self, x: Tensor) -> Tensor:
        """Inputs [..., in] as the file's weight reads them."""
        return hadamard_blocks(x, self.hadamard)

    def output_hessian(self, matrix: Tensor) -> Tensor:
        """Output Hessian [out, out] in the order of the file's rows."""
        if not self.rope_heads:
            return matrix
        return interleave_rope(interleave_rope(matrix, self.rope_heads).T, self.rope_heads).T.contiguous()

    def input_hessian(self, matrix: Tensor) -> Tensor:
        """Hessian [in, in] of the inputs that the file's weight multiplies."""
        return hadamard_blocks(hadamard_blocks(matrix, self.hadamard).T, self.hadamard).T.contiguous()


def layout_of(linear: Linear, config: Any, hadamard: int) -> WeightLayout:
    """A linear's. hadamard: columns per block of the transform, for the linears that can have one."""
    heads = getattr(config, linear.rope_heads) if linear.rope_heads else 0
    return WeightLayout(heads, hadamard if linear.hadamard else 0)

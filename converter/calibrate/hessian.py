"""Hessians: weighted second moments of vectors, X^T X up to a factor, as in GPTQ.

With H = X^T D X / tr(D) of rows X of a linear's inputs, their weights on the diagonal of D, an error E of the linear's
weights [out, in] causes a mean squared error tr(E H E^T) of its outputs. The same class holds output Hessians: second
moments of the gradients by a linear's outputs (fisher.py).

The Hessian of many columns is taken as block-diagonal: only blocks of `width` columns each are kept, in one matrix
[cols, width], whose row i holds the columns of the block that column i belongs to. Up to MAX_WIDTH columns there is one
block, the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..transform.weight_layout import WeightLayout

SAMPLE_ROWS = 64  # kept of every batch of rows
PANEL = 256  # columns summed at a time
MAX_WIDTH = 4096  # columns of a diagonal block at most
FLOAT32_WIDTH = 1024  # wider blocks are factorized in float32: half the time and memory of float64
ALIGN = 64  # a block's columns are a multiple of a packed block of weights


@dataclass(frozen=True)
class Damping:
    """What is added to a Hessian's diagonal, relative to its mean (docs/decisions/clustering.md).

    A covariance of few rows is noise to about the share of columns per row: beyond `spared`, `noise` of them are added.
    """

    least: float = 0.1
    noise: float = 0.4
    spared: float = 0.25

    def share(self, cols: int, rows: int) -> float:
        """For a block of so many columns, estimated from so many rows."""
        return self.least + self.noise * max(0.0, cols / max(1, rows) - self.spared)

    def of_every(self, stride: int) -> Damping:
        """For a Hessian to which only every stride-th row was added."""
        return Damping(self.least, self.noise / stride, self.spared * stride)


INPUT_DAMPING = Damping()
OUTPUT_DAMPING = Damping(noise=1.0, spared=0.0)  # gradients have heavier tails


def block_width(cols: int) -> int:
    """Columns of the diagonal blocks: as few blocks as possible, as even as possible."""
    n_blocks = -(-cols // MAX_WIDTH)
    return cols if n_blocks <= 1 else -(-cols // n_blocks // ALIGN) * ALIGN


class Hessian:
    """sum w x x^T / sum w over rows x [cols] with weights w: float32 [cols, width], the diagonal blocks.

    tokens: rows seen; some of them are kept as they were where output_norm is to be asked for.
    """

    def __init__(self, cols: int, sampled: bool = False, width: int = 0, damping: Damping = INPUT_DAMPING) -> None:
        """Nothing seen yet. sampled: keep some rows, for output_norm. width: of the blocks, if not block_width."""
        self._sum = torch.zeros(cols, width or block_width(cols))
        self._sample: list[Tensor] = []
        self._total = 0.0
        self._damping, self._sampled = damping, sampled
        self.tokens = 0

    @classmethod
    def of(cls, matrix: Tensor, tokens: int, damping: Damping = INPUT_DAMPING) -> Hessian:
        """A known Hessian [cols, width] of so many rows."""
        hessian = cls(0, damping=damping)
        hessian._sum, hessian._total, hessian.tokens = matrix, 1.0, tokens
        return hessian

    @classmethod
    def of_rows(cls, x: Tensor) -> Hessian:
        """The Hessian of rows x [tokens, cols], some of which are kept."""
        hessian = cls(x.shape[1], sampled=True)
        hessian.add(x)
        return hessian

    def _blocks(self, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The columns of each diagonal block, and the block itself, a view."""
        cols, width = matrix.shape
        for begin in range(0, cols, max(1, width)):
            end = min(begin + width, cols)
            yield slice(begin, end), matrix[begin:end, : end - begin]

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [tokens, cols]; weight [tokens] >= 0, all 1 where there is none."""
        for columns, block in self._blocks(self._sum):
            own = x[:, columns]
            weighted = own if weight is None else own * weight[:, None]
            for begin in range(0, len(block), PANEL):  # the upper triangle would only repeat the lower one
                end = min(begin + PANEL, len(block))
                block[begin:end, :end].addmm_(weighted[:, begin:end].T, own[:, :end])
        self._total += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        if self._sampled:
            self._sample.append(x[:: max(1, len(x) // SAMPLE_ROWS)].clone())
        self.tokens += len(x)

    @property
    def rows_per_column(self) -> float:
        """Rows seen per column of a block: how much there is to estimate a block from."""
        return self.tokens / max(1, self._sum.shape[1])

    @cached_property
    def matrix(self) -> Tensor:
        """The diagonal blocks [cols, width]; only once all rows have been added."""
        matrix = self._sum.div_(max(self._total, torch.finfo(torch.float32).tiny))  # in place: they may be large
        for _, block in self._blocks(matrix):
            _mirror(block)
        return matrix

    @cached_property
    def damped(self) -> Tensor:
        """The matrix with more on its diagonal, so that directions that the calibration did not show count too."""
        matrix = self.matrix.clone()
        diagonals = [block.diagonal() for _, block in self._blocks(matrix)]
        mean = sum(float(diagonal.sum()) for diagonal in diagonals) / max(1, len(matrix))
        share = self._damping.share(matrix.shape[1], self.tokens)
        for diagonal in diagonals:
            diagonal.add_(max(share * mean, torch.finfo(torch.float32).tiny))
        return matrix

    @cached_property
    def diagonal(self) -> Tensor:
        """Diagonal [cols] of the damped Hessian."""
        return torch.cat([block.diagonal() for _, block in self._blocks(self.damped)])

    @cached_property
    def cholesky(self) -> Tensor:
        """Upper triangular V [cols, width] with V V^T = damped: the Cholesky factor, rows and columns backwards.

        Squared, its diagonal is each column's variance where the columns after it are known.
        """
        factor = torch.zeros_like(self.damped)
        for (_, block), (_, to) in zip(self._blocks(self.damped), self._blocks(factor), strict=True):
            backwards = (block if len(block) > FLOAT32_WIDTH else block.double()).flip(0, 1)
            to.copy_(torch.linalg.cholesky(backwards).flip(0, 1))
        return factor

    @cached_property
    def cholesky_diagonal(self) -> Tensor:
        """Diagonal [cols] of the Cholesky factor."""
        return torch.cat([block.diagonal() for _, block in self._blocks(self.cholesky)])

    def factorize(self) -> None:
        """Compute damped and cholesky now, on all of torch's threads and before several threads read them."""
        _ = self.cholesky  # which is cached, and damped with it

    @property
    def feedback_gain(self) -> float:
        """What is left of a quantization error's energy when feedback moves it to later columns: at most 1."""
        return float(self.cholesky_diagonal.double().square().sum() / self.diagonal.sum())

    def in_layout(self, layout: WeightLayout) -> Hessian:
        """The Hessian of the inputs that the file's weight multiplies."""
        if not layout.hadamard:
            return self
        hessian = self._mapped(layout.input_hessian)
        hessian._sample = [layout.columns(rows) for rows in self._sample]
        return hessian

    def of_outputs(self, layout: WeightLayout) -> Hessian:
        """An output Hessian, in the order of the file's rows."""
        return self._mapped(layout.output_hessian) if layout.rope_heads else self

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Hessian:
        mapped = torch.zeros_like(self.matrix)
        for (_, block), (_, to) in zip(self._blocks(self.matrix), self._blocks(mapped), strict=True):
            to.copy_(change(block))
        return Hessian.of(mapped, self.tokens, self._damping)

    def output_norm(self, weight: Tensor) -> float:
        """Mean square of the outputs of a weight [rows, cols] over the rows that were kept, summed over its rows."""
        sample = torch.cat(self._sample)
        return float((sample @ weight.T).square().sum(dtype=torch.float64) / len(sample))


def _mirror(block: Tensor) -> None:
    """Copy the lower triangle to the upper one, panel by panel, as a transposition strides through memory."""
    for begin in range(0, len(block), PANEL):
        end = min(begin + PANEL, len(block))
        own = block[begin:end, begin:end]
        own.copy_(own.tril() + own.tril(-1).T)
        for other in range(0, begin, PANEL):
            block[other : other + PANEL, begin:end] = block[begin:end, other : other + PANEL].T

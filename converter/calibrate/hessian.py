"""Weighted second moments of rows: inputs of a linear, or gradients of its outputs.

Of many columns only squares along the diagonal are kept, of `width` columns each: row i of a matrix [cols, width] has
the columns of i's square. Up to WIDEST columns that is the whole.
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
WIDEST = 4096  # columns that a square has at most
WIDE = 1024  # columns, beyond which factors are computed in float32: half the time and memory
ALIGN = 64  # columns of squares are a multiple of a packed block


@dataclass(frozen=True)
class Damping:
    """What is added to the second moments' diagonal, relative to its mean (docs/decisions/clustering.md).

    A covariance of few rows is noise to about the share of columns per row: beyond `spared`, `noise` of them are added.
    """

    least: float = 0.1
    noise: float = 0.4
    spared: float = 0.25

    def share(self, cols: int, rows: int) -> float:
        """For a square of so many columns, of so many rows."""
        return self.least + self.noise * max(0.0, cols / max(1, rows) - self.spared)

    def of_every(self, stride: int) -> Damping:
        """For hessian of which only every stride-th row was summed."""
        return Damping(self.least, self.noise / stride, self.spared * stride)


INPUT_DAMPING = Damping()
OUTPUT_DAMPING = Damping(noise=1.0, spared=0.0)  # gradients have heavier tails


def square_width(cols: int) -> int:
    """Columns of the squares: as few squares as possible, as even as possible."""
    n_squares = -(-cols // WIDEST)
    return cols if n_squares <= 1 else -(-cols // n_squares // ALIGN) * ALIGN


class Hessian:
    """sum w x x^T / sum w over rows x [cols] with weights w: float32 [cols, width].

    tokens: rows seen; sample: some of them as they were, [rows, cols].
    """

    def __init__(self, cols: int, sampled: bool = False, width: int = 0, damping: Damping = INPUT_DAMPING) -> None:
        """Nothing seen yet. sampled: keep some rows, for output_norm. width: of the squares if not square_width."""
        self._sum = torch.zeros(cols, width or square_width(cols))
        self._sample: list[Tensor] = []
        self._total = 0.0
        self._damping, self._sampled = damping, sampled
        self.tokens = 0

    @classmethod
    def of(cls, matrix: Tensor, tokens: int, damping: Damping = INPUT_DAMPING) -> Hessian:
        """Known second moments [cols, width] of so many rows."""
        hessian = cls(0, damping=damping)
        hessian._sum, hessian._total, hessian.tokens = matrix, 1.0, tokens
        return hessian

    @classmethod
    def of_rows(cls, x: Tensor) -> Hessian:
        """The second moments of rows x [tokens, cols], some of them kept."""
        hessian = cls(x.shape[1], sampled=True)
        hessian.add(x)
        return hessian

    def _squares(self, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Columns of each square, and the square itself, a view."""
        cols, width = matrix.shape
        for begin in range(0, cols, max(1, width)):
            end = min(begin + width, cols)
            yield slice(begin, end), matrix[begin:end, : end - begin]

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [tokens, cols]; weight [tokens] >= 0, all 1 where there is none."""
        for columns, square in self._squares(self._sum):
            own = x[:, columns]
            weighted = own if weight is None else own * weight[:, None]
            for begin in range(0, len(square), PANEL):  # the upper half would only repeat the lower one
                end = min(begin + PANEL, len(square))
                square[begin:end, :end].addmm_(weighted[:, begin:end].T, own[:, :end])
        self._total += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        if self._sampled:
            self._sample.append(x[:: max(1, len(x) // SAMPLE_ROWS)].clone())
        self.tokens += len(x)

    @property
    def rows_per_column(self) -> float:
        """Of a square: how much there is to estimate it from."""
        return self.tokens / max(1, self._sum.shape[1])

    @cached_property
    def matrix(self) -> Tensor:
        """The second moments [cols, width]; only once all rows have been added."""
        matrix = self._sum.div_(max(self._total, torch.finfo(torch.float32).tiny))  # in place: they may be large
        for _, square in self._squares(matrix):
            _mirror(square)
        return matrix

    @cached_property
    def diagonal(self) -> Tensor:
        """Of the damped hessian, [cols]."""
        return torch.cat([square.diagonal() for _, square in self._squares(self.damped)])

    @cached_property
    def damped(self) -> Tensor:
        """The matrix with more on its diagonal, so that directions that the calibration did not show count too."""
        matrix = self.matrix.clone()
        diagonals = [square.diagonal() for _, square in self._squares(matrix)]
        mean = sum(float(diagonal.sum()) for diagonal in diagonals) / max(1, len(matrix))
        share = self._damping.share(matrix.shape[1], self.tokens)
        for diagonal in diagonals:
            diagonal.add_(max(share * mean, torch.finfo(torch.float32).tiny))
        return matrix

    @cached_property
    def cholesky(self) -> Tensor:
        """Upper triangular V [cols, width] with V V^T = damped: its Cholesky factor, rows and columns backwards.

        Squared, its diagonal is each column's variance where the columns after it are known.
        """
        factor = torch.zeros_like(self.damped)
        for (_, square), (_, to) in zip(self._squares(self.damped), self._squares(factor), strict=True):
            backwards = (square if len(square) > WIDE else square.double()).flip(0, 1)
            to.copy_(torch.linalg.cholesky(backwards).flip(0, 1))
        return factor

    @cached_property
    def cholesky_diagonal(self) -> Tensor:
        """[cols]."""
        return torch.cat([square.diagonal() for _, square in self._squares(self.cholesky)])

    @cached_property
    def feedback_gain(self) -> float:
        """What is left of a quantization error's energy when feedback moves it to later columns: at most 1."""
        return float(self.cholesky_diagonal.double().square().sum() / self.diagonal.sum())

    def in_layout(self, layout: WeightLayout) -> Hessian:
        """The hessian of the inputs that the file's weight multiplies."""
        if not layout.hadamard:
            return self
        hessian = self._mapped(layout.input_hessian)
        hessian._sample = [layout.columns(rows) for rows in self._sample]
        return hessian

    def of_outputs(self, layout: WeightLayout) -> Hessian:
        """The hessian of outputs in the order of the file's rows."""
        return self._mapped(layout.output_hessian) if layout.rope_heads else self

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Hessian:
        mapped = torch.zeros_like(self.matrix)
        for (_, square), (_, to) in zip(self._squares(self.matrix), self._squares(mapped), strict=True):
            to.copy_(change(square))
        return Hessian.of(mapped, self.tokens, self._damping)

    def output_norm(self, weight: Tensor) -> float:
        """Mean square of the outputs of a weight [rows, cols] over the sample, summed over the rows."""
        sample = torch.cat(self._sample)
        return float((sample @ weight.T).square().sum(dtype=torch.float64) / len(sample))


def _mirror(square: Tensor) -> None:
    """Copies the lower half to the upper one, block by block, as a transposition strides through memory."""
    for begin in range(0, len(square), PANEL):
        end = min(begin + PANEL, len(square))
        own = square[begin:end, begin:end]
        own.copy_(own.tril() + own.tril(-1).T)
        for other in range(0, begin, PANEL):
            square[other : other + PANEL, begin:end] = square[begin:end, other : other + PANEL].T

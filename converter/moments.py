"""Weighted second moments of rows: inputs of a linear, or gradients of its outputs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .basis import FileBasis

DAMPING = 0.1  # added to the second moments' diagonal, relative to its mean: lowest held-out error (docs/decisions.md)
SAMPLE_ROWS = 64  # kept of every batch of rows
PANEL = 256  # columns summed at a time
WIDE = 1024  # columns, beyond which factors are computed in float32: half the time and memory


class Moments:
    """sum w x x^T / sum w over rows x [cols] with weights w: float32 [cols, cols].

    tokens: rows seen; sample: some of them as they were, [rows, cols].
    """

    def __init__(self, cols: int, damping: float = DAMPING, sampled: bool = False) -> None:
        """Nothing seen yet. sampled: keep some rows, for relative_error."""
        self._sum = torch.zeros(cols, cols)
        self._sample: list[Tensor] = []
        self._total = 0.0
        self._damping, self._sampled = damping, sampled
        self.tokens = 0

    @classmethod
    def of(cls, matrix: Tensor, tokens: int, damping: float = DAMPING) -> Moments:
        """Known second moments [cols, cols] of so many rows."""
        moments = cls(len(matrix), damping)
        moments._sum, moments._total, moments.tokens = matrix, 1.0, tokens
        return moments

    @classmethod
    def of_rows(cls, x: Tensor) -> Moments:
        """The second moments of rows x [tokens, cols], some of them kept."""
        moments = cls(x.shape[1], sampled=True)
        moments.add(x)
        return moments

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [tokens, cols]; weight [tokens] >= 0, all 1 where there is none."""
        weighted = x if weight is None else x * weight[:, None]
        for begin in range(0, x.shape[1], PANEL):  # the upper half would only repeat the lower one
            end = min(begin + PANEL, x.shape[1])
            self._sum[begin:end, :end].addmm_(weighted[:, begin:end].T, x[:, :end])
        self._total += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        if self._sampled:
            self._sample.append(x[:: max(1, len(x) // SAMPLE_ROWS)].clone())
        self.tokens += len(x)

    @cached_property
    def matrix(self) -> Tensor:
        """The second moments [cols, cols]; only once all rows have been added."""
        matrix = self._sum / max(self._total, torch.finfo(torch.float32).tiny)
        for begin in range(0, len(matrix), PANEL):  # block by block, as a transposition strides through memory
            end = min(begin + PANEL, len(matrix))
            own = matrix[begin:end, begin:end]
            own.copy_(own.tril() + own.tril(-1).T)
            for other in range(0, begin, PANEL):
                matrix[other : other + PANEL, begin:end] = matrix[begin:end, other : other + PANEL].T
        return matrix

    @cached_property
    def damped(self) -> Tensor:
        """The matrix with more on its diagonal, so that directions that the calibration did not show count too."""
        matrix = self.matrix.clone()
        damping = max(self._damping * float(matrix.diagonal().mean()), torch.finfo(torch.float32).tiny)
        matrix.diagonal().add_(damping)
        return matrix

    @cached_property
    def feedback_factor(self) -> Tensor:
        """Upper Cholesky factor [cols, cols] of the inverse of damped: U^T U = damped^-1."""
        factor = self._backward_factor()
        eye = torch.eye(len(factor), dtype=factor.dtype)
        return torch.linalg.solve_triangular(factor, eye, upper=True).float().contiguous()

    @cached_property
    def feedback_gain(self) -> float:
        """What is left of a quantization error's energy when feedback moves it to later columns: at most 1."""
        conditional = self._backward_factor().diagonal().square()  # a column's variance, the columns after it known
        return float(conditional.sum() / self.damped.diagonal().sum())

    def _backward_factor(self) -> Tensor:
        """Upper V with V V^T = damped: its Cholesky factor, rows and columns taken backwards."""
        damped = self.damped if len(self.damped) > WIDE else self.damped.double()
        return torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)

    def in_basis(self, basis: FileBasis) -> Moments:
        """The moments of the inputs that the file's weight multiplies."""
        if not basis.hadamard:
            return self
        moments = Moments.of(basis.moments(self.matrix), self.tokens, self._damping)
        moments._sample = [basis.columns(rows) for rows in self._sample]
        return moments

    def of_outputs(self, basis: FileBasis) -> Moments:
        """The moments of outputs in the order of the file's rows."""
        return Moments.of(basis.outputs(self.matrix), self.tokens, self._damping)

    def relative_error(self, weight: Tensor, quantized: Tensor) -> tuple[float, float]:
        """Mean squared output error and output norm over the sample, for weights [rows, cols]."""
        sample = torch.cat(self._sample)
        error, total = (
            (sample @ m.T).square().sum(dtype=torch.float64) / len(sample) for m in (weight - quantized, weight)
        )
        return float(error), float(total)

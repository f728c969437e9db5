"""One weight -> the arrays that the file holds for it, and the weights they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Clustered

from ..calibrate.hessian import Hessian
from ..settings import Refinement
from .clustering import (
    ITERATIONS_BEFORE_FEEDBACK,
    Fit,
    OutputErrors,
    descend,
    descend_noting,
    error_feedback,
    fit_codebooks,
    new_fit,
    weights_of,
)
from .plan import PlannedTensor
from .row_feedback import cluster_in_turn, sweep
from .spill_file import SpillFile
from .task_pool import Task

F16_MAX = 65504.0
PIECE = 1 << 24  # weights
PIECE_ROWS = 1024
DESCENT_ROWS = 8  # calibration tokens per column from which on descent pays (docs/decisions/clustering.md)


@dataclass(frozen=True)
class ErrorSums:
    """Squared error and square of a linear's outputs per token, on so many tokens; of its weights if there are 0."""

    tokens: int
    error: float
    total: float


@dataclass
class Quantized:
    """A weight [..., out, in] in its planned type.

    fits: of a clustered type, one per matrix; they may still change, until they are `stored`. plain: the array of any
    other type. original and hessian, statistics of its inputs where there are any, serve the error alone.
    """

    planned: PlannedTensor
    original: Tensor | None
    hessian: Hessian | None
    fits: list[Fit]
    plain: NDArray[Any] | None
    stored: list[Clustered] | None = None
    final: ErrorSums | None = None

    def arrays(self) -> list[NDArray[Any]]:
        """What the file holds, in the order of the plan's parts."""
        if self.plain is not None:
            return [self.plain]
        parts = []
        for clustered in self.stored or [fit.clustered() for fit in self.fits]:
            groups = [] if clustered.group_scales is None else [clustered.group_scales]
            parts.append([clustered.packed, clustered.centroids, clustered.scales, *groups])
        stacked = [np.stack(arrays) for arrays in zip(*parts, strict=True)]
        return stacked if len(self.planned.shape) == 3 else [array[0] for array in stacked]

    def weight(self, n_threads: int) -> Tensor:
        """Float32, what a kernel effectively multiplies."""
        if self.plain is None:
            fits = self.fits or [Fit.of(clustered) for clustered in self.stored or []]
            matrices = [torch.from_numpy(weights_of(fit, n_threads)) for fit in fits]
            whole = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
            return whole.reshape(self.planned.shape)
        return _floats(self.planned, self.plain).reshape(self.planned.shape)

    def rows(self, ids: Tensor, n_threads: int) -> Tensor:
        """weight()[ids] of a matrix, for ids of any shape; of an embedding, whose other rows need not be there."""
        if self.plain is None:
            return self.weight(n_threads)[ids]
        return _floats(self.planned, self.plain[ids.flatten().numpy()]).reshape(*ids.shape, -1)

    def error_sums(self, n_threads: int) -> ErrorSums:
        """Of the outputs on the calibration inputs, of the weights without any."""
        if self.final is not None:
            return self.final
        assert self.original is not None
        seen = self.hessian if self.hessian is not None and self.hessian.tokens else None
        error = total = 0.0
        for original, effective in self._rows_beside(self.original, n_threads):
            difference = original - effective
            for_piece = [seen.output_norm(m) if seen else float(m.square().sum()) for m in (difference, original)]
            error, total = error + for_piece[0], total + for_piece[1]
        return ErrorSums(seen.tokens if seen else 0, error, total)

    def _rows_beside(self, original: Tensor, n_threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The original and what the file stands for, a few rows at a time."""
        if self.plain is not None:
            rows = original.reshape(-1, original.shape[-1])
            stored = self.plain.reshape(len(rows), -1)
            for begin in range(0, len(rows), PIECE_ROWS):
                piece = slice(begin, begin + PIECE_ROWS)
                yield rows[piece], _floats(self.planned, stored[piece])
        for fit, matrix in zip(self.fits, original if original.dim() == 3 else original[None], strict=False):
            for begin in range(0, len(matrix), PIECE_ROWS):
                end = min(begin + PIECE_ROWS, len(matrix))
                yield matrix[begin:end], torch.from_numpy(weights_of(fit.rows(begin, end), n_threads))

    def rel_error(self, n_threads: int) -> float:
        """||XW - XW'|| / ||XW|| on the calibration inputs, ||W - W'|| / ||W|| without any."""
        return relative_error([self.error_sums(n_threads)])

    def finish(self, n_threads: int) -> None:
        """Forget everything but what the file holds and the error."""
        self.final = self.error_sums(n_threads)
        self.original = self.hessian = None
        if self.fits:
            self.stored, self.fits = [fit.clustered() for fit in self.fits], []


@dataclass
class QuantizedExperts:
    """A linear of all experts of a layer, one Quantized each; finished ones may lie on a spill file."""

    planned: PlannedTensor
    experts: list[Quantized] | SpillFile[Quantized]

    @property
    def fits(self) -> list[Fit]:
        """One per expert of a clustered type."""
        return [fit for expert in self.experts for fit in expert.fits]

    def arrays(self) -> list[NDArray[Any]]:
        """What the file holds, in the order of the plan's parts."""
        if not self.planned.expert_types:
            return self._stacked(range(len(self.experts)))
        sections = [ids for ids, _ in self.planned.sections()]
        return [array for ids in sections for array in [*self._stacked(ids), np.array(ids, np.int32)]]

    def _stacked(self, ids: Iterable[int]) -> list[NDArray[Any]]:
        parts = [self.experts[number].arrays() for number in ids]
        return [np.stack(arrays) for arrays in zip(*parts, strict=True)]

    def weight(self, n_threads: int) -> Tensor:
        """Float32 [n_experts, out, in], what a kernel effectively multiplies."""
        return torch.stack([expert.weight(n_threads) for expert in self.experts])

    def rel_error(self, n_threads: int) -> float:
        """As Quantized.rel_error, over all experts; those that saw no token are left out where others did."""
        return relative_error([expert.error_sums(n_threads) for expert in self.experts])


def relative_error(sums: list[ErrorSums]) -> float:
    """The error relative to what it is an error of, as norms."""
    seen = [(s.tokens * s.error, s.tokens * s.total) for s in sums if s.tokens]
    error, total = (sum(values) for values in zip(*(seen or [(s.error, s.total) for s in sums]), strict=True))
    return float((error / total) ** 0.5) if total > 0 else 0.0


def store_unclustered(planned: PlannedTensor, weight: Tensor) -> Quantized:
    """A weight whose planned type is not clustered."""
    return Quantized(planned, weight, None, [], _plain(planned, weight))


def quantize(
    planned: PlannedTensor, weight: Tensor, hessian: Hessian | None, output: Hessian | None, refinement: Refinement
) -> tuple[Quantized, list[Task]]:
    """Weight [..., out, in] in its planned type, once the tasks have run: one per clustered matrix.

    hessian, output: statistics of its inputs and of its outputs' gradients, where there are any; those that have seen
    no token count as none.
    """
    if planned.cq is None:
        return Quantized(planned, weight, hessian, [], _plain(planned, weight)), []
    seen = hessian if hessian is not None and hessian.tokens else None
    by_output = output if output is not None and output.tokens else None
    fits, tasks = [], []
    for matrix in weight if weight.dim() == 3 else weight[None]:
        importance = seen.diagonal.numpy() if seen else np.ones(matrix.shape[1], np.float32)
        fit = new_fit(matrix.numpy(), importance, planned.cq, planned.grouping, copy=by_output is not None)
        tasks.append(_clustering_task(fit, seen, by_output, refinement))
        fits.append(fit)
    return Quantized(planned, weight, hessian, fits, None), tasks


def _clustering_task(fit: Fit, hessian: Hessian | None, output: Hessian | None, refinement: Refinement) -> Task:
    if refinement.feedback:
        for entry in (hessian, output):
            if entry is not None:
                _ = entry.cholesky  # cached: here all of torch's threads work on it
    rows, cols = fit.w.shape
    return Task(rows * cols * cols, lambda n_threads: _cluster(fit, hessian, output, refinement, n_threads))


def _floats(planned: PlannedTensor, plain: NDArray[Any]) -> Tensor:
    """What rows of a type that is not clustered stand for."""
    if planned.type == GGMLQuantizationType.Q8_0:
        plain = quants.dequantize(plain, GGMLQuantizationType.Q8_0)
    return torch.tensor(plain, dtype=torch.float32)  # aligned, which NumPy's are not


def _plain(planned: PlannedTensor, weight: Tensor) -> NDArray[Any]:
    values = np.ascontiguousarray(weight.numpy(), np.float32)
    if planned.type == GGMLQuantizationType.F32:
        return values
    if planned.type == GGMLQuantizationType.F16:
        if float(weight.abs().max()) > F16_MAX:
            raise CQError(f"{planned.name}: values beyond the range of F16: use --tensor-type")
        return values.astype(np.float16)
    rows = values.reshape(-1, values.shape[-1])
    pieces = [quants.quantize(piece, GGMLQuantizationType.Q8_0) for piece in _pieces(rows)]
    return np.concatenate(pieces).reshape(*values.shape[:-1], -1)


def _pieces(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Few rows at a time: gguf's conversions need several times the memory of what they convert."""
    return np.array_split(rows, -(-rows.size // PIECE))


def _cluster(fit: Fit, hessian: Hessian | None, output: Hessian | None, refine: Refinement, n_threads: int) -> None:
    if hessian is None or not refine.feedback:
        fit_codebooks(fit, n_threads)
        return

    def from_scratch(rows: Fit) -> None:
        fit_codebooks(rows, n_threads, ITERATIONS_BEFORE_FEEDBACK)
        error_feedback(rows, hessian.cholesky.numpy(), n_threads)

    def descent(rows: Fit) -> OutputErrors:
        return descend_noting(rows, hessian.damped.numpy(), n_threads, 1)

    rounds = refine.descent_rounds if hessian.rows_per_column >= DESCENT_ROWS else 0
    if output is None:
        from_scratch(fit)
        if rounds:
            descend(fit, hessian.damped.numpy(), n_threads, rounds)
        return
    weight = torch.from_numpy(fit.w.copy()) if rounds else None
    cluster_in_turn(fit, output.cholesky, from_scratch, n_threads)
    for _ in range(rounds if weight is not None else 0):
        sweep(fit, weight, output.damped, descent, n_threads)

"""Weights of clustered types while their codebooks are made, and how they are made: k-means, feedback, descent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
from .stored import PIECE_ROWS, StoredClustered, StoredWeight, error_sums, store_unclustered
from .task_pool import Task, run_tasks

DESCENT_ROWS = 8  # calibration tokens per column from which on descent pays (docs/decisions/clustering.md)


@dataclass(frozen=True)
class Hessians:
    """What is known of a linear: the Hessian of its inputs and its output Hessian, each None where nothing was seen."""

    inputs: Hessian | None = None
    outputs: Hessian | None = None

    @classmethod
    def of_seen(cls, inputs: Hessian | None, outputs: Hessian | None) -> Hessians:
        """Those that have seen a token: an expert may have none."""
        return cls(*(hessian if hessian is not None and hessian.tokens else None for hessian in (inputs, outputs)))

    def factorize(self) -> None:
        """Compute the Cholesky factors now, on all of torch's threads."""
        for hessian in (self.inputs, self.outputs):
            if hessian is not None:
                hessian.factorize()


@dataclass(frozen=True)
class FittedWeight:
    """A weight [..., out, in] of a clustered type, whose fits, one per matrix, may still change.

    original: what it is fitted to, in the file's layout; inputs: the Hessian of its inputs, for the error.
    """

    planned: PlannedTensor
    original: Tensor
    inputs: Hessian | None
    fits: list[Fit]

    def weight(self, n_threads: int) -> Tensor:
        """Float32 [..., out, in]: what the fits stand for now."""
        matrices = [torch.from_numpy(weights_of(fit, n_threads)) for fit in self.fits]
        whole = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
        return whole.reshape(self.planned.shape)

    def store(self, n_threads: int) -> StoredClustered:
        """What the file holds of the fits as they are now, and their error."""
        errors = error_sums(self._pieces(n_threads), self.inputs)
        return StoredClustered(self.planned, errors, [fit.clustered() for fit in self.fits])

    def _pieces(self, n_threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        for fit, matrix in zip(self.fits, _matrices(self.original), strict=True):
            for begin in range(0, len(matrix), PIECE_ROWS):
                end = min(begin + PIECE_ROWS, len(matrix))
                yield matrix[begin:end], torch.from_numpy(weights_of(fit.rows(begin, end), n_threads))


def start_fit(
    planned: PlannedTensor, weight: Tensor, hessians: Hessians, refinement: Refinement
) -> tuple[FittedWeight, list[Task]]:
    """A weight [..., out, in] of a clustered type, fitted once the tasks have run: one per matrix."""
    assert planned.cq is not None
    if refinement.feedback:
        hessians.factorize()
    fits, tasks = [], []
    for matrix in _matrices(weight):
        rows, cols = matrix.shape
        importance = np.ones(cols, np.float32) if hessians.inputs is None else hessians.inputs.diagonal.numpy()
        own_rows = hessians.outputs is not None  # which become targets
        fit = new_fit(matrix.numpy(), importance, planned.cq, planned.grouping, copy=own_rows)
        tasks.append(Task(rows * cols * cols, _Clustering(fit, hessians, refinement).run))
        fits.append(fit)
    return FittedWeight(planned, weight, hessians.inputs, fits), tasks


def quantize(
    planned: PlannedTensor, weight: Tensor, inputs: Hessian | None, refinement: Refinement, n_threads: int
) -> StoredWeight:
    """One weight [..., out, in] by itself, on all threads. inputs: Hessian of its inputs, where it is known."""
    if planned.cq is None:
        return store_unclustered(planned, weight, inputs)
    fitted, tasks = start_fit(planned, weight, Hessians.of_seen(inputs, None), refinement)
    run_tasks(tasks, n_threads)
    return fitted.store(n_threads)


def _matrices(weight: Tensor) -> Tensor:
    """[n, out, in] of a weight [out, in] or [n, out, in]."""
    return weight if weight.dim() == 3 else weight[None]


@dataclass(frozen=True)
class _Clustering:
    """The work on one matrix."""

    fit: Fit
    hessians: Hessians
    refinement: Refinement

    def run(self, n_threads: int) -> None:
        """k-means; where the inputs are known error feedback and descent, where the outputs are, from row to row."""
        fit, inputs, outputs = self.fit, self.hessians.inputs, self.hessians.outputs
        if inputs is None or not self.refinement.feedback:
            fit_codebooks(fit, n_threads)
            return

        def from_scratch(rows: Fit) -> None:
            fit_codebooks(rows, n_threads, ITERATIONS_BEFORE_FEEDBACK)
            error_feedback(rows, inputs.cholesky.numpy(), n_threads)

        def descent(rows: Fit) -> OutputErrors:
            return descend_noting(rows, inputs.damped.numpy(), n_threads, 1)

        rounds = self.refinement.descent_rounds if inputs.rows_per_column >= DESCENT_ROWS else 0
        if outputs is None:
            from_scratch(fit)
            if rounds:
                descend(fit, inputs.damped.numpy(), n_threads, rounds)
            return
        weight = torch.from_numpy(fit.w.copy()) if rounds else None  # fit.w becomes targets
        cluster_in_turn(fit, outputs.cholesky, from_scratch, n_threads)
        for _ in range(rounds if weight is not None else 0):
            sweep(fit, weight, outputs.damped, descent, n_threads)

"""Feedback from row to row: the errors of some rows are made up for by others, in what follows the linear.

The loss is sum_ij O_ij e_i H e_j^T over the errors e of the rows; O is the output Hessian, H the Hessian of the inputs.
With some rows fixed, the best values of the others are targets that do not depend on H; whatever quantizes a row then
goes on under H alone. So the first pass is GPTQ's with rows in place of columns (YAQA, arXiv 2505.22988), and further
sweeps are coordinate descent over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .clustering import Fit, OutputErrors, weights_of
from .task_pool import stop_point

ROWS = 16  # quantized side by side, without feedback among them: the native batch (docs/decisions/clustering.md)


def cluster_in_turn(fit: Fit, cholesky: Tensor, cluster_rows: Callable[[Fit], None], n_threads: int) -> None:
    """Apply cluster_rows to blocks of rows of the fit, one after another; fit.w becomes each row's target.

    cholesky float32 [rows, rows]: upper triangular V, with V V^T the output Hessian. The loss is that of the rows of
    V^T e, each of which depends on the errors of the rows up to it. V's diagonal says what a row's error costs after
    all later rows have made up for it.
    """
    fit.row_weight[:] = relative(cholesky.diagonal().square())
    targets = torch.from_numpy(fit.w)
    error = torch.zeros_like(targets)
    for begin in range(0, len(targets), ROWS):
        stop_point()
        end = min(begin + ROWS, len(targets))
        weight = targets[begin:end].clone()
        left = cholesky[:begin, begin:end].T @ error[:begin]
        own = cholesky[begin:end, begin:end].T
        targets[begin:end] -= torch.linalg.solve_triangular(own, left, upper=False)
        block = fit.rows(begin, end)
        cluster_rows(block)
        error[begin:end] = torch.from_numpy(weights_of(block, n_threads)) - weight


def relative(weights: Tensor) -> NDArray[np.float32]:
    """Weights of the rows in units of the largest, none of them zero."""
    return (weights / weights.max()).clamp_min(1e-6).numpy().astype(np.float32)


def sweep(
    fit: Fit, weight: Tensor, outputs: Tensor, descend_rows: Callable[[Fit], OutputErrors], n_threads: int
) -> None:
    """Apply descend_rows to blocks of rows of the fit, one after another, at the best targets for the others' errors.

    weight [rows, cols]: what the fit approximates; outputs [rows, rows]: the output Hessian, positive definite. The
    loss never increases: a block of rows that would raise it stays as it was.
    """
    fit.row_weight[:] = relative(outputs.diagonal())
    error = torch.from_numpy(weights_of(fit, n_threads)) - weight
    for begin in range(0, len(weight), ROWS):
        stop_point()
        rows = slice(begin, min(begin + ROWS, len(weight)))
        own = outputs[rows, rows]
        pull = outputs[rows] @ error - own @ error[rows]
        target = weight[rows] - torch.cholesky_solve(pull, torch.linalg.cholesky(own))
        block = fit.rows(rows.start, rows.stop)
        before = block.copy()
        block.w[:] = target.numpy()
        errors = descend_rows(block)
        found = torch.from_numpy(weights_of(block, n_threads))
        lowered = _loss(own, found - target, errors.after) < _loss(
            own, error[rows] + weight[rows] - target, errors.before
        )
        if lowered:
            error[rows] = found - weight[rows]
        else:
            block.take(before)


def _loss(outputs: Tensor, delta: Tensor, times_inputs: NDArray[np.float32]) -> float:
    """Of deltas [rows, cols] from the targets; times_inputs: the deltas times the Hessian of the inputs."""
    return float(((outputs @ delta) * torch.from_numpy(times_inputs)).sum(dtype=torch.float64))

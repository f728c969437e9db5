"""Error feedback from row to row: what earlier rows did wrong, later ones make up for in what follows the linear.

Under a loss sum_ij O_ij e_i H e_j^T over the errors e of the rows (O: second moments of the outputs' gradients, H: of
the inputs), once some rows are quantized the others do best at targets that do not depend on H: GPTQ's update with
rows in place of columns. Whatever quantizes a row then goes on under H alone (YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clustering import Fit, weights_of

ROWS = 32  # clustered side by side, without feedback among them; a multiple of what one thread takes


def cluster_in_turn(fit: Fit, factor: Tensor, cluster_rows: Callable[[Fit], None], n_threads: int) -> None:
    """Apply cluster_rows to a few rows of the fit after another; fit.w becomes each row's target.

    factor float32 [rows, rows]: upper Cholesky factor of the inverse second moments of the outputs.
    """
    targets = torch.from_numpy(fit.w)
    n_rows = len(targets)
    for begin in range(0, n_rows, ROWS):
        end = min(begin + ROWS, n_rows)
        block = fit.rows(begin, end)
        cluster_rows(block)
        if end < n_rows:
            error = targets[begin:end] - torch.from_numpy(weights_of(block, n_threads))
            gain = torch.linalg.solve_triangular(factor[begin:end, begin:end], factor[begin:end, end:], upper=True)
            targets[end:] -= gain.T @ error

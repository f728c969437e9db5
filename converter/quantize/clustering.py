"""Stage 3: codebooks and assignments of one weight matrix, by the native library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.format import BLOCK, Clustered, CQType, Grouping, pack, unpack
from pyggml_bridge.native import aligned_empty, ffi, lib, pointer

from ..settings import DESCENT_ROUNDS

ITERATIONS = 8
ITERATIONS_BEFORE_FEEDBACK = 6  # which chooses the indices anew


@dataclass
class Fit:
    """Codebooks in the making; arrays as in format.Clustered, indices unpacked uint8 [rows, cols].

    w float32 [rows, cols]: what is fitted. weight float32 [cols] >= 0: importance of each column. loss float64 [rows]:
    sum over columns of weight * (w - effective weight)^2. row_weight float32 [rows]: what the losses count beside each
    other, where rows are fitted together.
    """

    cq: CQType
    w: NDArray[np.float32]
    weight: NDArray[np.float32]
    row_weight: NDArray[np.float32]
    codebook_rows: int
    codebook_cols: int
    scale_cols: int
    indices: NDArray[np.uint8]
    centroids: NDArray[np.int8]
    group_scales: NDArray[np.int8] | None
    scales: NDArray[np.float32]
    loss: NDArray[np.float64]

    def rows(self, begin: int, end: int) -> Fit:
        """A view of some rows; begin is a multiple of codebook_rows."""
        assert begin % self.codebook_rows == 0
        rows, books = slice(begin, end), slice(begin // self.codebook_rows, -(-end // self.codebook_rows))
        groups = None if self.group_scales is None else self.group_scales[rows]
        return replace(
            self,
            w=self.w[rows],
            row_weight=self.row_weight[rows],
            indices=self.indices[rows],
            centroids=self.centroids[books],
            group_scales=groups,
            scales=self.scales[rows],
            loss=self.loss[rows],
        )

    def copy(self) -> Fit:
        """The same with arrays of its own."""
        groups = None if self.group_scales is None else self.group_scales.copy()
        arrays = {name: getattr(self, name).copy() for name in ("w", "indices", "centroids", "scales", "loss")}
        return replace(self, group_scales=groups, **arrays)

    def take(self, other: Fit) -> None:
        """Overwrite the arrays by another fit's of the same shape."""
        for name in ("w", "indices", "centroids", "group_scales", "scales", "loss"):
            if getattr(self, name) is not None:
                getattr(self, name)[:] = getattr(other, name)

    @classmethod
    def of(cls, stored: Clustered) -> Fit:
        """From what the file holds of a matrix, without the weights that it was fitted to."""
        indices = unpack(stored.packed, stored.cq, stored.codebook_rows)
        nothing, n_rows = np.empty(0, np.float32), len(indices)
        return cls(
            stored.cq,
            nothing,
            nothing,
            np.ones(n_rows, np.float32),
            stored.codebook_rows,
            stored.codebook_cols,
            stored.scale_cols,
            indices,
            stored.centroids,
            stored.group_scales,
            stored.scales,
            np.zeros(n_rows),
        )

    def clustered(self) -> Clustered:
        """Packed as the file holds it."""
        packed = pack(self.indices, self.cq, self.codebook_rows)
        sizes = self.codebook_cols, self.scale_cols, self.codebook_rows
        return Clustered(self.cq, packed, self.centroids, self.scales, self.group_scales, *sizes)


def new_fit(
    w: NDArray[np.float32], weight: NDArray[np.float32], cq: CQType, grouping: Grouping, copy: bool = True
) -> Fit:
    """Room for the codebooks of w [rows, cols]; copy: of w, where its rows will become targets of their own.

    weight float32 [cols] >= 0: importance of each column (mean square of its input).
    """
    rows, cols = w.shape
    whole_row = -(-cols // BLOCK) * BLOCK
    codebook_cols = whole_row if grouping.group_size == -1 else min(grouping.group_size, whole_row)
    scale_cols = 0 if grouping.scale_group == -1 else grouping.scale_group
    return Fit(
        cq,
        np.array(w, np.float32, order="C") if copy else np.ascontiguousarray(w, np.float32),
        np.ascontiguousarray(weight, np.float32),
        np.ones(rows, np.float32),
        grouping.codebook_rows,
        codebook_cols,
        scale_cols,
        np.empty((rows, cols), np.uint8),
        np.empty((-(-rows // grouping.codebook_rows), -(-cols // codebook_cols) * cq.n_centroids), np.int8),
        np.empty((rows, -(-cols // scale_cols)), np.int8) if scale_cols else None,
        np.zeros(rows, np.float32),
        np.zeros(rows, np.float64),
    )


def fit_codebooks(fit: Fit, n_threads: int, iterations: int = ITERATIONS) -> None:
    """Weighted 1-D k-means of every row, or of the rows that share codebooks, fitted to int8 centroids and scales."""
    job = _job(fit, iterations)
    scratch = aligned_empty(n_threads * lib.cq_cluster_scratch_bytes(job))
    _check(lib.cq_cluster_rows(job, n_threads, pointer(scratch, "uint8_t *")))


def error_feedback(fit: Fit, cholesky: NDArray[np.float32], n_threads: int) -> None:
    """Choose the indices anew, each column's rounding error moved to the columns after it (GPTQ).

    cholesky float32 [cols, width]: Cholesky factor of the inputs' Hessian, as in hessian.py.
    """
    job, v = _job(fit, 0, cholesky.shape[1]), pointer(cholesky, "const float *")
    scratch = aligned_empty(n_threads * lib.cq_descent_scratch_bytes(job))
    _check(lib.cq_feedback_rows(job, v, n_threads, pointer(scratch, "uint8_t *")))


@dataclass(frozen=True)
class OutputErrors:
    """(effective weights - w) H, float32 [rows, cols], before and after a descent under the Hessian H."""

    before: NDArray[np.float32]
    after: NDArray[np.float32]


def descend(fit: Fit, hessian: NDArray[np.float32], n_threads: int, rounds: int = DESCENT_ROUNDS) -> None:
    """Refit codebooks and indices in turn under the inputs' Hessian, float32 [cols, width] as in hessian.py (LNQ).

    fit.loss becomes each row's r H r^T with r = effective weights - w; it never increases.
    """
    _descend(_job(fit, rounds, hessian.shape[1]), hessian, n_threads)


def descend_noting(
    fit: Fit, hessian: NDArray[np.float32], n_threads: int, rounds: int = DESCENT_ROUNDS
) -> OutputErrors:
    """As descend; returns what it has computed on the way."""
    errors = OutputErrors(np.empty_like(fit.w), np.empty_like(fit.w))
    job = _job(fit, rounds, hessian.shape[1])
    job.gradient_before = pointer(errors.before, "float *")
    job.gradient_after = pointer(errors.after, "float *")
    _descend(job, hessian, n_threads)
    return errors


def _descend(job: Any, hessian: NDArray[np.float32], n_threads: int) -> None:
    h = pointer(hessian, "const float *")
    scratch = aligned_empty(n_threads * lib.cq_descent_scratch_bytes(job))
    _check(lib.cq_descend_rows(job, h, n_threads, pointer(scratch, "uint8_t *")))


def weights_of(fit: Fit, n_threads: int) -> NDArray[np.float32]:
    """The weights [rows, cols] that the fit stands for, aligned for torch (docs/decisions/conversion.md)."""
    out = aligned_empty(4 * fit.indices.size).view(np.float32).reshape(fit.indices.shape)
    _check(lib.cq_clustered_weights(_job(fit, 0), pointer(out, "float *"), n_threads))
    return out


def _job(fit: Fit, iterations: int, hessian_width: int = 0) -> Any:
    rows, cols = fit.indices.shape
    return ffi.new(
        "cq_clustering *",
        {
            "n_rows": rows,
            "n_cols": cols,
            "n_centroids": fit.cq.n_centroids,
            "trellis": fit.cq.trellis,
            "codebook_rows": fit.codebook_rows,
            "codebook_cols": fit.codebook_cols,
            "scale_cols": fit.scale_cols,
            "n_iterations": iterations,
            "w": pointer(fit.w, "const float *"),
            "weight": pointer(fit.weight, "const float *"),
            "row_weight": pointer(fit.row_weight, "const float *"),
            "indices": pointer(fit.indices, "uint8_t *"),
            "centroids": pointer(fit.centroids, "int8_t *"),
            "group_scales": pointer(fit.group_scales, "int8_t *"),
            "scales": pointer(fit.scales, "float *"),
            "loss": pointer(fit.loss, "double *"),
            "hessian_width": hessian_width,
        },
    )


def _check(status: int) -> None:
    if status != lib.CQ_OK:
        raise ValueError(f"clustering: native status {status}")

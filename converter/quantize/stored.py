"""Weights as the file holds them, each with the error that its quantization left."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from .clustering import Fit, weights_of
from .plan import PlannedTensor

F16_MAX = 65504.0
PIECE = 1 << 24  # weights that are converted at a time
PIECE_ROWS = 1024  # rows whose errors are summed at a time


@dataclass(frozen=True)
class ErrorSums:
    """Squared error and square of a linear's outputs per token, over so many tokens; of its weights if there are 0."""

    tokens: int
    error: float
    total: float


def error_sums(pieces: Iterable[tuple[Tensor, Tensor]], inputs: Hessian | None) -> ErrorSums:
    """Over pieces of a weight: original and stored rows [rows, cols] beside each other.

    inputs: Hessian of the calibration inputs; without one, or without tokens in it, the weights' own error counts.
    """
    seen = inputs if inputs is not None and inputs.tokens else None
    error = total = 0.0
    for original, effective in pieces:
        difference = original - effective
        for_piece = [seen.output_norm(m) if seen else float(m.square().sum()) for m in (difference, original)]
        error, total = error + for_piece[0], total + for_piece[1]
    return ErrorSums(seen.tokens if seen else 0, error, total)


def relative_error(sums: list[ErrorSums]) -> float:
    """||XW - XW'|| / ||XW|| of matrices together; those without tokens are left out where others have some."""
    seen = [(s.tokens * s.error, s.tokens * s.total) for s in sums if s.tokens]
    error, total = (sum(values) for values in zip(*(seen or [(s.error, s.total) for s in sums]), strict=True))
    return float((error / total) ** 0.5) if total > 0 else 0.0


@dataclass(frozen=True)
class StoredWeight(ABC):
    """A weight [..., out, in] in its planned type."""

    planned: PlannedTensor
    error: ErrorSums

    @abstractmethod
    def arrays(self) -> list[NDArray[Any]]:
        """What the file holds, in the order of the plan's parts."""

    @abstractmethod
    def weight(self, n_threads: int) -> Tensor:
        """Float32 [..., out, in]: what a kernel effectively multiplies."""

    def rows(self, ids: Tensor, n_threads: int) -> Tensor:
        """weight()[ids] of a matrix, for ids of any shape."""
        return self.weight(n_threads)[ids]

    @property
    def rel_error(self) -> float:
        """||XW - XW'|| / ||XW|| on the calibration inputs, ||W - W'|| / ||W|| without any."""
        return relative_error([self.error])


@dataclass(frozen=True)
class StoredClustered(StoredWeight):
    """Of a clustered type: one entry per matrix."""

    matrices: list[Clustered]

    def arrays(self) -> list[NDArray[Any]]:
        """Packed indices, centroids, scales, and group scales where there are any."""
        parts = []
        for clustered in self.matrices:
            groups = [] if clustered.group_scales is None else [clustered.group_scales]
            parts.append([clustered.packed, clustered.centroids, clustered.scales, *groups])
        stacked = [np.stack(arrays) for arrays in zip(*parts, strict=True)]
        return stacked if len(self.planned.shape) == 3 else [array[0] for array in stacked]

    def weight(self, n_threads: int) -> Tensor:
        """Float32 [..., out, in]."""
        matrices = [torch.from_numpy(weights_of(Fit.of(clustered), n_threads)) for clustered in self.matrices]
        whole = matrices[0] if len(matrices) == 1 else torch.stack(matrices)
        return whole.reshape(self.planned.shape)


@dataclass(frozen=True)
class StoredArray(StoredWeight):
    """Of any other type, F32, F16 or Q8_0: one array."""

    array: NDArray[Any]

    def arrays(self) -> list[NDArray[Any]]:
        """The array."""
        return [self.array]

    def weight(self, n_threads: int) -> Tensor:
        """Float32 [..., out, in]."""
        return _floats(self.planned, self.array).reshape(self.planned.shape)

    def rows(self, ids: Tensor, n_threads: int) -> Tensor:
        """weight()[ids] without the other rows in memory: an embedding has many."""
        return _floats(self.planned, self.array[ids.flatten().numpy()]).reshape(*ids.shape, -1)


def store_unclustered(planned: PlannedTensor, weight: Tensor, inputs: Hessian | None = None) -> StoredArray:
    """A weight whose planned type is not clustered; CQError for values that F16 cannot hold.

    inputs: Hessian of its inputs, where it is known: for the error.
    """
    array = _converted(planned, weight)
    return StoredArray(planned, error_sums(_pieces(planned, weight, array), inputs), array)


def _pieces(planned: PlannedTensor, weight: Tensor, array: NDArray[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    rows = weight.reshape(-1, weight.shape[-1])
    stored = array.reshape(len(rows), -1)
    for begin in range(0, len(rows), PIECE_ROWS):
        piece = slice(begin, begin + PIECE_ROWS)
        yield rows[piece], _floats(planned, stored[piece])


def _floats(planned: PlannedTensor, array: NDArray[Any]) -> Tensor:
    """The float32 weights that rows of a type that is not clustered stand for."""
    if planned.type == GGMLQuantizationType.Q8_0:
        array = quants.dequantize(array, GGMLQuantizationType.Q8_0)
    return torch.tensor(array, dtype=torch.float32)  # aligned, which NumPy's are not


def _converted(planned: PlannedTensor, weight: Tensor) -> NDArray[Any]:
    values = np.ascontiguousarray(weight.numpy(), np.float32)
    if planned.type == GGMLQuantizationType.F32:
        return values
    if planned.type == GGMLQuantizationType.F16:
        if float(weight.abs().max()) > F16_MAX:
            raise CQError(f"{planned.name}: values beyond the range of F16: use --tensor-type")
        return values.astype(np.float16)
    rows = values.reshape(-1, values.shape[-1])
    # A few rows at a time: gguf's conversions need several times the memory of what they convert.
    pieces = np.array_split(rows, -(-rows.size // PIECE))
    quantized = [quants.quantize(piece, GGMLQuantizationType.Q8_0) for piece in pieces]
    return np.concatenate(quantized).reshape(*values.shape[:-1], -1)

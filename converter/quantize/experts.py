"""A linear of all experts of a layer: one weight each, fitted or stored; stored ones may lie in a spill file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .clustering import Fit
from .fitting import FittedWeight
from .plan import PlannedTensor
from .spill_file import SpillFile
from .stored import StoredWeight, relative_error


@dataclass(frozen=True)
class StoredExperts:
    """Weights [out, in] of all experts, each in its planned type."""

    planned: PlannedTensor
    experts: list[StoredWeight] | SpillFile[StoredWeight]

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
        """Float32 [n_experts, out, in]: what a kernel effectively multiplies."""
        return torch.stack([expert.weight(n_threads) for expert in self.experts])

    @property
    def rel_error(self) -> float:
        """As StoredWeight.rel_error, over all experts; those that saw no token are left out where others did."""
        return relative_error([expert.error for expert in self.experts])


@dataclass(frozen=True)
class FittedExperts:
    """Weights [out, in] of all experts, all of one clustered type, whose fits may still change."""

    planned: PlannedTensor
    experts: list[FittedWeight]

    @property
    def fits(self) -> list[Fit]:
        """One per expert."""
        return [fit for expert in self.experts for fit in expert.fits]

    def weight(self, n_threads: int) -> Tensor:
        """Float32 [n_experts, out, in]: what the fits stand for now."""
        return torch.stack([expert.weight(n_threads) for expert in self.experts])

    def store(self, n_threads: int) -> StoredExperts:
        """What the file holds of the fits as they are now, and their errors."""
        return StoredExperts(self.planned, [expert.store(n_threads) for expert in self.experts])

"""What may still change a layer's codebooks when all of them are there: the interface of the published method."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..results import Tuned
from ..resume.work_folder import WorkFolder
from .experts import FittedExperts, StoredExperts
from .fitting import FittedWeight
from .stored import StoredWeight

Fitted = FittedWeight | FittedExperts
Stored = StoredWeight | StoredExperts


class Tuner(Protocol):
    """Called for every layer in turn, between clustering and storing."""

    def tune(self, index: int, weights: dict[str, Fitted | Stored], hidden: Tensor) -> Tuned:
        """Change the fits of a layer's weights, by GGUF stem, in place.

        hidden [sequences, n, hidden]: the layer's input behind the quantized layers below it.
        """

    def load(self, work: WorkFolder, n_layers: int) -> None:
        """Go on from what `save` kept after so many layers, if any."""

    def save(self, work: WorkFolder, n_layers: int) -> None:
        """Keep what tuning goes on from after so many layers, beside what is kept of one layer less.

        The folder counts a layer only after this: a conversion killed in between goes on from the layer before.
        """

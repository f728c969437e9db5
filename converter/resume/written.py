"""How far the output file has come, kept in the work folder after every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..results import Tuned
from .work_folder import WorkFolder

NAME = "written"


@dataclass
class Written:
    """Layers that the file holds, and what the next one follows from.

    hidden [sequences, n, hidden]: the next layer's input behind the quantized ones, None without calibration;
    original_hidden: behind the original ones, where the published method needs it. The rest is the report's.
    """

    n_layers: int = 0
    hidden: Tensor | None = None
    original_hidden: Tensor | None = None
    rel_errors: dict[str, float] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)

    @classmethod
    def load(cls, work: WorkFolder) -> Written | None:
        """What the folder holds; None before the first layer."""
        saved = work.load(NAME)
        if saved is None:
            return None
        return cls(**saved | {"tuned": [Tuned(**layer) for layer in saved["tuned"]]})

    def save(self, work: WorkFolder) -> None:
        """Replace what the folder holds."""
        tensors = {"hidden": self.hidden, "original_hidden": self.original_hidden}
        rest = {"n_layers": self.n_layers, "rel_errors": self.rel_errors, "experts": self.experts}
        work.save(NAME, tensors | rest | {"tuned": [asdict(layer) for layer in self.tuned]})

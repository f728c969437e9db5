"""How far the output file has come, kept in the work folder after every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..results import Findings
from .work_folder import WorkFolder

NAME = "written"


@dataclass
class Written:
    """Layers that the file holds, the next one's input, and what the report will say of those that are done.

    hidden [sequences, n, hidden]: the hidden states behind the quantized layers, None without calibration.
    """

    n_layers: int = 0
    hidden: Tensor | None = None
    findings: Findings = field(default_factory=Findings)

    @classmethod
    def load(cls, work: WorkFolder) -> Written | None:
        """What the folder holds; None before the first layer."""
        saved = work.load(NAME)
        if saved is None:
            return None
        return cls(saved["n_layers"], saved["hidden"], Findings.from_state_dict(saved["findings"]))

    def save(self, work: WorkFolder) -> None:
        """Replace what the folder holds."""
        findings = self.findings.state_dict()
        work.save(NAME, {"n_layers": self.n_layers, "hidden": self.hidden, "findings": findings})

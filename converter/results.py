"""What the stages return for the report: data that a resumed conversion reads back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion takes at its peak, of memory and of disk in the work folder; about how many seconds."""

    memory: int
    disk: int
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning a layer did: its steps, the loss on held-out sequences before and after; equal if undone."""

    steps: int
    loss_start: float
    loss_end: float


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens each expert of a layer got."""

    layer: int
    tokens: list[int]


@dataclass
class Findings:
    """What quantizing the tensors showed: relative output errors by tensor, experts' tokens and tuning by layer."""

    rel_errors: dict[str, float] = field(default_factory=dict)
    experts: list[ExpertTokens] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Dicts, lists and numbers, as a work folder can keep them."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Findings:
        """Inverse of state_dict."""
        experts = [ExpertTokens(**layer) for layer in saved["experts"]]
        return cls(saved["rel_errors"], experts, [Tuned(**layer) for layer in saved["tuned"]])


@dataclass(frozen=True)
class CheckResult:
    """What the finished file says. kld: mean divergence from the original in nats; sample: a greedy continuation."""

    finite: bool
    kld: float
    sample: str

"""What the report says of a layer: plain data that the stages return and that a resumed conversion reads back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning a layer did: its steps, the loss on held-out sequences before and after; equal if undone."""

    steps: int
    loss_start: float
    loss_end: float

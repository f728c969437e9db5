"""What a conversion did: a table with a row per tensor, a summary, and the JSON document."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from pyggml_bridge.cli.common import peak_memory_bytes

from .console import console, warn
from .quantize.plan import Plan, PlannedTensor
from .results import Tuned
from .transform.rotation import LearnedRotation


@dataclass
class Report:
    """Filled in by the pipeline."""

    plan: Plan
    out: str
    rel_errors: dict[str, float] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    rotation: LearnedRotation | None = None
    tuned: list[Tuned] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """The JSON document of interfaces: --json and --report."""
        tensors = self.plan.tensors
        document: dict[str, Any] = {
            "out": self.out,
            "bytes": self.nbytes,
            "bpw": self.plan.bpw,
            "bpw_total": 8 * self.nbytes / sum(t.n_weights for t in tensors),
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "tensors": [self._entry(tensor) for tensor in tensors],
            "experts": self.experts,
            "check": self.check,
        }
        if self.rotation:
            loss = {"start": self.rotation.loss_start, "end": self.rotation.loss_end, "steps": self.rotation.steps}
            document["rotation_loss"] = loss
        if self.tuned:
            document["finetune"] = [asdict(layer) for layer in self.tuned]
        return document

    def _entry(self, tensor: PlannedTensor) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": tensor.name, "type": tensor.type_name, "shape": list(tensor.shape)}
        entry |= {"bpw": tensor.bpw, "rel_error": self.rel_errors.get(tensor.name)}
        return entry | ({"note": tensor.note} if tensor.note else {})

    def print(self) -> None:
        """The per-tensor table and a summary, on stderr."""
        console.print(tensor_table(self.plan, self.rel_errors))
        if self.rotation:
            r = self.rotation
            console.print(f"rotation: quantization loss {r.loss_start:.4g} -> {r.loss_end:.4g} in {r.steps} steps")
        if self.tuned:
            start, end = (sum(loss) for loss in zip(*((t.loss_start, t.loss_end) for t in self.tuned), strict=True))
            kept = sum(t.loss_end < t.loss_start for t in self.tuned)
            console.print(f"fine-tuning: loss {start:.4g} -> {end:.4g}, {kept} of {len(self.tuned)} layers changed")
        for entry in self.experts:
            idle = [expert for expert, tokens in enumerate(entry["tokens"]) if not tokens]
            if idle:
                warn(f"layer {entry['layer']}: experts {idle} saw no calibration token: clustered by weight only")
        if self.check:
            console.print(f"check: KLD {self.check['kld']:.4f}, sample: {self.check['sample']!r}")
        console.print(
            f"{self.out}: {self.nbytes / 1e6:.1f} MB, {self.plan.bpw:.3f} bits per weight, {self.seconds:.0f} s, "
            f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
        )


def tensor_table(plan: Plan, rel_errors: dict[str, float]) -> Table:
    """One row per tensor, one-dimensional ones left out."""
    table = Table("tensor", "shape", "type", "bpw", "rel. error", "note", box=None)
    for tensor in plan.tensors:
        if len(tensor.shape) > 1:
            error = f"{rel_errors[tensor.name]:.4f}" if tensor.name in rel_errors else ""
            shape = " x ".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, tensor.type_name, f"{tensor.bpw:.3f}", error, tensor.note)
    return table

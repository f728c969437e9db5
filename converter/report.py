"""What a conversion did, or would do: a table with a row per tensor, a summary, and the JSON document."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pyggml_bridge.cli.common import peak_memory_bytes

from .console import console, warn
from .quantize.plan import Plan, PlannedTensor
from .results import CheckResult, Findings, Needs
from .transform.rotation import LearnedRotation


@dataclass(frozen=True)
class Report:
    """A finished conversion. rotation: if it was learned; check: if the file was checked; seconds: wall clock."""

    plan: Plan
    out: str
    findings: Findings
    rotation: LearnedRotation | None
    check: CheckResult | None
    nbytes: int
    seconds: float

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
            "experts": [asdict(layer) for layer in self.findings.experts],
            "check": asdict(self.check) if self.check else {},
        }
        if self.rotation:
            loss = {"start": self.rotation.loss_start, "end": self.rotation.loss_end, "steps": self.rotation.steps}
            document["rotation_loss"] = loss
        if self.findings.tuned:
            document["finetune"] = [asdict(layer) for layer in self.findings.tuned]
        return document

    def _entry(self, tensor: PlannedTensor) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": tensor.name, "type": tensor.type_name, "shape": list(tensor.shape)}
        entry |= {"bpw": tensor.bpw, "rel_error": self.findings.rel_errors.get(tensor.name)}
        return entry | ({"note": tensor.note} if tensor.note else {})

    def print(self) -> None:
        """The per-tensor table and a summary, on stderr."""
        console.print(tensor_table(self.plan, self.findings.rel_errors))
        if self.rotation:
            r = self.rotation
            console.print(f"rotation: quantization loss {r.loss_start:.4g} -> {r.loss_end:.4g} in {r.steps} steps")
        tuned = self.findings.tuned
        if tuned:
            start, end = sum(layer.loss_start for layer in tuned), sum(layer.loss_end for layer in tuned)
            kept = sum(layer.loss_end < layer.loss_start for layer in tuned)
            console.print(f"fine-tuning: loss {start:.4g} -> {end:.4g}, {kept} of {len(tuned)} layers changed")
        for entry in self.findings.experts:
            idle = [expert for expert, tokens in enumerate(entry.tokens) if not tokens]
            if idle:
                warn(f"layer {entry.layer}: experts {idle} saw no calibration token: clustered by weight only")
        if self.check:
            console.print(f"check: KLD {self.check.kld:.4f}, sample: {self.check.sample!r}")
        console.print(
            f"{self.out}: {self.nbytes / 1e6:.1f} MB, {self.plan.bpw:.3f} bits per weight, {self.seconds:.0f} s, "
            f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do: the plan before sensitivity is measured, and what it would need."""

    plan: Plan
    out: str
    needs: Needs

    def document(self) -> dict[str, Any]:
        """The JSON document of interfaces: --dry-run --json."""
        needed = {
            "peak_memory_bytes": self.needs.memory,
            "disk_bytes": self.needs.disk,
            "seconds": self.needs.seconds,
        }
        tensors = [
            {"name": t.name, "type": t.type_name, "shape": list(t.shape), "bpw": t.bpw, "bytes": t.nbytes}
            for t in self.plan.tensors
        ]
        return {"out": self.out, "bytes": self.plan.nbytes, "bpw": self.plan.bpw, **needed, "tensors": tensors}

    def print(self) -> None:
        """The per-tensor table and a summary, on stderr."""
        console.print(tensor_table(self.plan, {}))
        console.print(
            f"{self.out}: {self.plan.nbytes / 1e6:.1f} MB of tensors, {self.plan.bpw:.3f} bits per weight; "
            f"about {self.needs.memory / 1e9:.1f} GB of memory, {self.needs.disk / 1e9:.1f} GB of disk at most "
            f"while it converts, {self.needs.seconds / 60:.0f} minutes or so; nothing written"
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

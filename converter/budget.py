"""Types by measured sensitivity: the least predicted divergence from the original at a given size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pyggml_bridge.errors import CQError

from .plan import Plan, PlannedTensor
from .settings import Settings

# Squared error relative to a unit Gaussian's: CQ4 by Lloyd and Max's quantizer of 16 levels, the other clustered types
# by what they leave relative to it after clustering (docs/decisions.md); Q8_0 with steps of 2.2 / 127, the mean largest
# of 32 being 2.2.
DISTORTION = {
    "cq2": 0.140,
    "cq2t": 0.115,
    "cq3": 0.0355,
    "cq3t": 0.0273,
    "cq4": 0.0095,
    "cq4t": 0.0073,
    "cq5": 0.00256,
    "q8_0": (2.2 / 127) ** 2 / 12,
}


RING = 8  # rows around which the distortions of the types with T were measured

# Defaults of --target-bpw: the size of llama.cpp's Q4_0, and a little less where experts fill the memory.
DEFAULT_BPW, DEFAULT_EXPERTS_BPW = 4.5, 4.4


def default_bpw(plan: Plan, has_experts: bool) -> float:
    """What a conversion without --bits and --target-bpw aims at: not below the plan's own, for very narrow models."""
    return max(plan.bpw, DEFAULT_EXPERTS_BPW if has_experts else DEFAULT_BPW)


def allocate(plan: Plan, damage: list[dict[str, float]], settings: Settings, target_bpw: float) -> Plan:
    """The plan with new types for all linears that --tensor-type leaves free and that can be clustered.

    damage: per layer, linear -> divergence in nats per token at a distortion of 1 (sensitivity.py). From the smallest
    types up, the step that saves most per byte comes first, as long as one fits. CQError if not even those fit.
    """
    first = _with_types(plan, {t.name: "cq2" for t in _free(plan, damage, settings)})
    if first.bpw > target_bpw:
        raise CQError(f"--target-bpw {target_bpw:g}: the smallest types take {first.bpw:.3f}")
    choices = {t.name: _choices(t, damage, settings) for t in _free(first, damage, settings)}
    at = dict.fromkeys(choices, 0)
    n_weights = first.body_bytes * 8 / first.bpw
    room = int(target_bpw * n_weights / 8) - first.body_bytes
    while True:
        steps = [
            ((own[at[name]].loss - larger.loss) / (larger.nbytes - own[at[name]].nbytes), name, i)
            for name, own in choices.items()
            for i, larger in enumerate(own[at[name] + 1 :], at[name] + 1)
            if larger.nbytes - own[at[name]].nbytes <= room
        ]
        if not steps:
            return _with_types(plan, {name: own[at[name]].type for name, own in choices.items()})
        _, name, i = max(steps, key=lambda step: step[:2])
        room -= choices[name][i].nbytes - choices[name][at[name]].nbytes
        at[name] = i


@dataclass(frozen=True)
class _Choice:
    """A type that a tensor can have. loss: predicted divergence in nats per token."""

    type: str
    nbytes: int
    loss: float


def _choices(smallest: PlannedTensor, damage: list[dict[str, float]], settings: Settings) -> list[_Choice]:
    """From the smallest type up, each larger than the one before and better."""
    _, layer, stem, _ = smallest.name.split(".")
    weight = damage[int(layer)][stem]
    trellis = settings.trellis and settings.grouping.codebook_rows == RING  # a shorter ring gains less than measured
    kinds = [kind for kind in DISTORTION if trellis or not kind.endswith("t")]
    sizes = {kind: replace(smallest, type=kind).nbytes for kind in kinds}
    found: list[_Choice] = []
    for kind in sorted(kinds, key=lambda kind: (sizes[kind], DISTORTION[kind])):
        choice = _Choice(kind, sizes[kind], weight * DISTORTION[kind])
        if not found or (choice.nbytes > found[-1].nbytes and DISTORTION[kind] < DISTORTION[found[-1].type]):
            found.append(choice)
    return found


def _free(plan: Plan, damage: list[dict[str, float]], settings: Settings) -> Iterable[PlannedTensor]:
    for layer, known in zip(plan.layers, damage, strict=True):
        for tensor in layer:
            _, _, stem, kind = tensor.name.split(".")  # a bias has its linear's stem
            overridden = any(override.pattern.search(tensor.name) for override in settings.overrides)
            if stem in known and kind == "weight" and not tensor.note and not overridden:
                yield tensor


def _with_types(plan: Plan, types: dict[str, str]) -> Plan:
    layers = [tuple(replace(t, type=types.get(t.name, t.type)) for t in layer) for layer in plan.layers]
    return replace(plan, layers=tuple(layers))

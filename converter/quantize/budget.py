"""Types by measured sensitivity: the least predicted divergence from the original at a given size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType, TensorType

from ..settings import Q8_0, Settings
from .plan import Plan, PlannedTensor

# Squared error relative to a unit Gaussian's: CQ4 by Lloyd and Max's quantizer of 16 levels, the other clustered types
# by what they leave relative to it after clustering (docs/decisions/format.md); Q8_0 with steps of 2.2 / 127, the mean
# largest of 32 being 2.2.
DISTORTION: dict[TensorType, float] = {
    CQType.CQ2: 0.140,
    CQType.CQ2T: 0.115,
    CQType.CQ3: 0.0355,
    CQType.CQ3T: 0.0273,
    CQType.CQ4: 0.0095,
    CQType.CQ4T: 0.0073,
    CQType.CQ5: 0.00256,
    Q8_0: (2.2 / 127) ** 2 / 12,
}

TRELLIS_ROWS = 8  # rows around which the distortions of the types with T were measured
ID_BYTES = 4  # an expert's number beside a part of a weight that is cut by type

# Defaults of --target-bpw: the size of llama.cpp's Q4_0, and a little less where experts fill the memory.
DEFAULT_BPW, DEFAULT_EXPERTS_BPW = 4.5, 4.4


def default_bpw(plan: Plan, has_experts: bool) -> float:
    """What a conversion without --bits and --target-bpw aims at: not below the plan's own, for very narrow models."""
    return max(plan.bpw, DEFAULT_EXPERTS_BPW if has_experts else DEFAULT_BPW)


def allocate(plan: Plan, predicted_kl: list[dict[str, list[float]]], settings: Settings, target_bpw: float) -> Plan:
    """The plan with new types for all linears that --tensor-type leaves free and that can be clustered.

    predicted_kl: per layer, linear -> nats per token at a distortion of 1 (fisher.py); where there is one per expert
    and the settings allow it, each expert gets a type of its own. From the smallest types up, the step that saves most
    per byte comes first, as long as one fits. CQError if not even the smallest types do.
    """
    free = list(_free(plan, predicted_kl, settings))
    first = _with_types(plan, {tensor.name: [CQType.CQ2] for tensor, _ in free})
    if first.bpw > target_bpw:
        raise CQError(f"--target-bpw {target_bpw:g}: the smallest types take {first.bpw:.3f}")
    items = [item for tensor, known in free for item in _items(tensor, known, settings)]
    n_weights = first.body_bytes * 8 / first.bpw
    room = int(target_bpw * n_weights / 8) - first.body_bytes - ID_BYTES * sum(item.expert for item in items)
    at = _climb([item.choices for item in items], room)
    types: dict[str, list[TensorType]] = {}
    for item, i in zip(items, at, strict=True):
        types.setdefault(item.name, []).append(item.choices[i].type)
    return _with_types(plan, types)


def _climb(items: list[list[_Choice]], room: int) -> list[int]:
    """Which choice each item gets: the step with the largest gain per byte first, until none fits into the room."""
    at = [0] * len(items)
    steps: list[tuple[float, int, int, int]] = []  # -gain per byte, item, from, to

    def push(i: int) -> None:
        own = items[i][at[i]]
        for to, larger in enumerate(items[i][at[i] + 1 :], at[i] + 1):
            heappush(steps, ((larger.loss - own.loss) / (larger.nbytes - own.nbytes), i, at[i], to))

    for i in range(len(items)):
        push(i)
    while steps:
        _, i, start, to = heappop(steps)
        nbytes = items[i][to].nbytes - items[i][start].nbytes
        if start == at[i] and nbytes <= room:  # what does not fit now never will
            room -= nbytes
            at[i] = to
            push(i)
    return at


@dataclass(frozen=True)
class _Choice:
    """A type that an item can have. loss: predicted divergence in nats per token."""

    type: TensorType
    nbytes: int
    loss: float


@dataclass(frozen=True)
class _Item:
    """A tensor, or one expert of it, and its types from the smallest up, each larger than the one before and better."""

    name: str
    expert: bool
    choices: list[_Choice]


def _items(tensor: PlannedTensor, predicted_kl: list[float], settings: Settings) -> list[_Item]:
    if len(predicted_kl) == 1 or not settings.expert_types:
        return [_Item(tensor.name, False, _choices(tensor, sum(predicted_kl), settings))]
    one = replace(tensor, shape=(1, *tensor.shape[1:]))
    return [_Item(tensor.name, True, _choices(one, value, settings)) for value in predicted_kl]


def _choices(tensor: PlannedTensor, predicted_kl: float, settings: Settings) -> list[_Choice]:
    trellis = settings.trellis and settings.grouping.codebook_rows == TRELLIS_ROWS  # fewer rows gain less than measured
    kinds = [kind for kind in DISTORTION if trellis or not (isinstance(kind, CQType) and kind.trellis)]
    sizes = {kind: tensor.of_types([kind]).nbytes for kind in kinds}
    found: list[_Choice] = []
    for kind in sorted(kinds, key=lambda kind: (sizes[kind], DISTORTION[kind])):
        choice = _Choice(kind, sizes[kind], predicted_kl * DISTORTION[kind])
        if not found or (choice.nbytes > found[-1].nbytes and DISTORTION[kind] < DISTORTION[found[-1].type]):
            found.append(choice)
    return found


def _free(
    plan: Plan, predicted_kl: list[dict[str, list[float]]], settings: Settings
) -> Iterable[tuple[PlannedTensor, list[float]]]:
    """The linears whose types may change, each with what is predicted for it."""
    for layer, known in zip(plan.layers, predicted_kl, strict=True):
        for tensor in layer:
            overridden = any(override.pattern.search(tensor.name) for override in settings.overrides)
            if tensor.linear in known and not tensor.note and not overridden:
                yield tensor, known[tensor.linear]


def _with_types(plan: Plan, types: dict[str, list[TensorType]]) -> Plan:
    layers = [tuple(t.of_types(types[t.name]) if t.name in types else t for t in layer) for layer in plan.layers]
    return replace(plan, layers=tuple(layers))

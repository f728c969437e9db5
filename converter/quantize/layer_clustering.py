"""The clustering of one decoder layer: its dense linears side by side, then its experts, each with its linears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..calibrate.gradients import LayerSensitivity
from ..calibrate.hessian import Hessian
from ..calibrate.layer_stream import LayerStream
from ..calibrate.streamed_experts import Expert, Routed
from ..estimate.memory import task_bytes, workers
from ..settings import Refinement, Settings
from ..source.architecture import Layer, Linear
from ..transform.transformed_model import TransformedModel
from ..transform.weight_layout import WeightLayout, layout_of
from .experts import FittedExperts, StoredExperts
from .fitting import FittedWeight, Hessians, start_fit
from .plan import Plan, PlannedTensor
from .spill_file import SpillFile
from .stored import StoredWeight, store_unclustered
from .task_pool import Task, run_tasks
from .tuner import Fitted, Stored


@dataclass(frozen=True)
class Seen:
    """What calibration showed of a layer: Hessians by linear input, tokens of experts; nothing without a text."""

    hessians: dict[str, Hessian] = field(default_factory=dict)
    routed: Routed | None = None
    sensitivity: LayerSensitivity | None = None

    def output_hessian(self, linear: Linear, expert: int = 0) -> Hessian | None:
        """A linear's, or one expert's of it; None where gradients were not measured."""
        packed = self.sensitivity.outputs.get(linear.name) if self.sensitivity else None
        return packed[expert].hessian() if packed else None

    def shared_output_hessians(self, linears: Iterable[Linear]) -> dict[str, Hessian]:
        """Of the experts' linears whose output Hessian is one for all experts; factorized before threads share it."""
        outputs = self.sensitivity.outputs if self.sensitivity else {}
        packed = {linear.name: outputs.get(linear.name, []) for linear in linears}
        shared = {name: entries[0].hessian() for name, entries in packed.items() if len(entries) == 1}
        for hessian in shared.values():
            hessian.factorize()
        return shared


class _InputHessians:
    """Hessians by linear input, each of which goes with the last linear that reads the input: they may be large."""

    def __init__(self, hessians: dict[str, Hessian], linears: Iterable[Linear]) -> None:
        """Empties the dict; linears: all that will be asked for."""
        self._hessians = hessians
        self._readers = Counter(linear.input for linear in linears)

    def take(self, linear: Linear) -> Hessian | None:
        """Of one linear's input, once per linear; None where nothing was seen."""
        self._readers[linear.input] -= 1
        if self._readers[linear.input]:
            return self._hessians.get(linear.input)
        return self._hessians.pop(linear.input, None)


@dataclass(frozen=True)
class _Matrices:
    """Linears that are clustered together: the dense ones of a layer, or those of one expert.

    layer: their weights, each of which goes when its linear is started; tasks: what is still to be done.
    """

    layer: Layer
    inputs: _InputHessians
    refinement: Refinement
    tasks: list[Task] = field(default_factory=list)

    def start(
        self, linear: Linear, planned: PlannedTensor, layout: WeightLayout, outputs: Hessian | None
    ) -> FittedWeight | StoredWeight:
        """Bring a linear into the file's layout; if its type is clustered, it is fitted when the tasks have run."""
        inputs = self.inputs.take(linear)
        inputs = inputs and inputs.in_layout(layout)
        weight = layout.to_file(self.layer.pop(linear.name)).contiguous()
        if planned.cq is None:
            return store_unclustered(planned, weight, inputs)
        outputs = outputs and outputs.of_outputs(layout)
        fitted, tasks = start_fit(planned, weight, Hessians.of_seen(inputs, outputs), self.refinement)
        self.tasks.extend(tasks)
        return fitted


@dataclass(frozen=True)
class _ExpertLinears:
    """The linears of a layer's experts. shared_outputs: their output Hessians where all experts have the same.

    places: GGUF stem -> where the experts' weights go by their number, as fits or, on disk, stored.
    """

    index: int
    planned: dict[Linear, PlannedTensor]
    seen: Seen
    shared_outputs: dict[str, Hessian]
    places: dict[str, _Places]

    def output_hessian(self, linear: Linear, number: int) -> Hessian | None:
        """Of one expert: its own, or the one that all share."""
        shared = self.shared_outputs.get(linear.name)
        return self.seen.output_hessian(linear, number) if shared is None else shared


@dataclass(frozen=True)
class LayerClustering:
    """Clusters layers of a model. Memory holds of a layer's experts those that are being clustered.

    folder: where finished experts lie until their layer is written. keeps_fits: clustered weights stay as they are
    fitted, in memory, for a tuner to change; else they are stored at once.
    """

    settings: Settings
    plan: Plan
    model: TransformedModel
    stream: LayerStream
    folder: Path
    keeps_fits: bool

    def cluster(self, index: int, layer: Layer, seen: Seen) -> dict[str, Fitted | Stored]:
        """All tensors of a layer by GGUF stem, in file order. layer: all but the experts; its linears are taken out."""
        arch = self.model.checkpoint.arch_of(index)
        planned = dict(zip((spec.name for spec in arch.specs), self.plan.layers[index], strict=True))
        dense = {linear: planned[linear.name] for linear in arch.linears if not linear.experts}
        experts = {linear: planned[linear.name] for linear in arch.linears if linear.experts}
        calibrated = bool(seen.hessians)  # of which clustering the dense linears leaves none
        found: dict[str, Fitted | Stored] = {}
        for spec in arch.unquantized:
            found[spec.name] = store_unclustered(planned[spec.name], layer[spec.name])
        found |= self._cluster_dense(dense, layer, seen, calibrated)
        if experts:
            found |= self._cluster_experts(index, experts, seen, calibrated)
        return {spec.name: found[spec.name] for spec in arch.specs}

    def _cluster_dense(
        self, planned: dict[Linear, PlannedTensor], layer: Layer, seen: Seen, calibrated: bool
    ) -> dict[str, Fitted | Stored]:
        """One task per matrix."""
        matrices = _Matrices(layer, _InputHessians(seen.hessians, planned), self.settings.refinement)
        found: dict[str, Fitted | Stored] = {}
        for linear, own in planned.items():
            found[linear.name] = matrices.start(linear, own, self._layout(linear), seen.output_hessian(linear))
        shapes = [weight.planned.shape[-2:] for weight in found.values() if isinstance(weight, FittedWeight)]
        self._run(matrices.tasks, [[shape] for shape in shapes], calibrated)
        for name in found if not self.keeps_fits else ():
            found[name] = stored(found[name], self.settings.threads)
        return found

    def _run(self, tasks: list[Task], shapes: list[list[tuple[int, ...]]], calibrated: bool) -> None:
        """As many tasks side by side as the memory allows, and forgets them. Each clusters matrices of some shapes."""
        if tasks:
            largest = max(task_bytes(each, self.settings, calibrated) for each in shapes)
            run_tasks(tasks, self.settings.threads, workers(self.settings, largest, len(tasks)))
            tasks.clear()

    def _layout(self, linear: Linear) -> WeightLayout:
        return layout_of(linear, self.model.checkpoint.config, self.plan.hadamard)

    # ---- experts ----

    def _cluster_experts(
        self, index: int, planned: dict[Linear, PlannedTensor], seen: Seen, calibrated: bool
    ) -> dict[str, Fitted | Stored]:
        """One task per expert: read, calibrate, cluster its linears, forget everything but the result."""
        n_experts = self.model.n_experts(index)
        work = _ExpertLinears(index, planned, seen, seen.shared_output_hessians(planned), {})
        for linear in planned:
            work.places[linear.name] = {} if self.keeps_fits else SpillFile(self.folder, n_experts)
        shapes = [tensor.shape[-2:] for tensor in planned.values()]
        cost = sum(rows * cols * cols for rows, cols in shapes)
        tasks = [Task(cost, partial(self._cluster_expert, work, number)) for number in range(n_experts)]
        self._run(tasks, [shapes], calibrated)
        return {linear.name: _together(tensor, work.places[linear.name]) for linear, tensor in planned.items()}

    def _cluster_expert(self, work: _ExpertLinears, number: int, n_threads: int) -> None:
        layer = self.model.expert(work.index, number)
        inputs = _InputHessians(self._expert_hessians(work, layer, number), work.planned)
        matrices = _Matrices(layer, inputs, self.settings.refinement)
        for linear, planned in work.planned.items():
            own, layout = planned.of_expert(number), self._layout(linear)
            weight = matrices.start(linear, own, layout, work.output_hessian(linear, number))
            while matrices.tasks:  # which hold what they work on
                matrices.tasks.pop().run(n_threads)
            _put(work.places[linear.name], number, weight, n_threads)
            del weight  # before the next one is made

    def _expert_hessians(self, work: _ExpertLinears, layer: Layer, number: int) -> dict[str, Hessian]:
        """By linear input, of what the linears of one expert [out, in] read; nothing without a text."""
        seen, arch = work.seen, self.model.checkpoint.arch_of(work.index)
        if not seen.routed:
            return {}
        experts_input = arch.experts_module or ""
        weights = seen.sensitivity.token_weights[experts_input] if seen.sensitivity else None
        expert = Expert.of(arch, layer, self.stream.activation(work.index))
        of_input, of_hidden = seen.routed.hessians(number, expert, weights)
        return {experts_input: of_input, f"{experts_input}.hidden": of_hidden}


def stored(weight: Fitted | Stored, n_threads: int) -> Stored:
    """What the file holds of a weight that nothing changes any more."""
    return weight.store(n_threads) if isinstance(weight, FittedWeight | FittedExperts) else weight


_Places = dict[int, FittedWeight | StoredWeight] | SpillFile[StoredWeight]


def _put(places: _Places, number: int, weight: FittedWeight | StoredWeight, n_threads: int) -> None:
    if not isinstance(places, SpillFile):
        places[number] = weight
    elif isinstance(weight, FittedWeight):
        places[number] = weight.store(n_threads)
    else:
        places[number] = weight


def _together(planned: PlannedTensor, experts: _Places) -> FittedExperts | StoredExperts:
    """All experts of a linear. Where fits are kept, all are of one type, and so all fitted or all stored."""
    if isinstance(experts, SpillFile):
        return StoredExperts(planned, experts)
    weights = [experts[number] for number in sorted(experts)]
    fitted = [weight for weight in weights if isinstance(weight, FittedWeight)]
    unclustered = [weight for weight in weights if isinstance(weight, StoredWeight)]
    assert not (fitted and unclustered)
    return FittedExperts(planned, fitted) if fitted else StoredExperts(planned, unclustered)

"""A conversion from settings to the finished file: open, plan, observe, rotate, measure sensitivity, write, check."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyggml_bridge.output import publish

from .calibrate.fisher import Sensitivity, folder_bytes, measure
from .calibrate.layer_stream import LayerStream
from .calibrate.observe import Observation, observe
from .calibrate.tokens import read_tokens, tokenize
from .console import warn
from .estimate.duration import estimated_seconds
from .estimate.memory import peak_bytes, require_memory, return_what_is_freed
from .output.check import check_file
from .output.gguf_file import check_output, require_free
from .output.model_writer import ModelWriter
from .quantize.budget import allocate, default_bpw
from .quantize.paper.tuner import tuning_bytes_per_weight
from .quantize.plan import Plan, make_plan
from .report import Report
from .results import Needs
from .resume.work_folder import WorkFolder, work_folder
from .settings import Settings
from .source.architecture import value_dim_of
from .source.checkpoint import Checkpoint
from .source.open_checkpoint import open_checkpoint
from .transform.rotation import LearnedRotation, learn_rotation, random_rotation
from .transform.transformed_model import TransformedModel

OBSERVED_SEQUENCES = 8
CHECK_TEXT = (
    "A hash table stores pairs of keys and values in an array. A hash function turns each key into an index of that "
    "array, so that a value can be found without looking at the others. Two keys may have the same index, which is "
    "called a collision: then both are kept in a short list at that place, or one of them moves on to the next free "
    "place. As long as the array is not too full, finding, adding and removing a pair takes the same short time "
    "however many there are."
)


def plan_conversion(settings: Settings) -> tuple[Checkpoint, Plan]:
    """Open the checkpoint and choose all types; nothing is written, no weight is read."""
    checkpoint = open_checkpoint(settings.model)
    return checkpoint, make_plan(checkpoint, settings)


def needs(settings: Settings, checkpoint: Checkpoint, plan: Plan) -> Needs:
    """From shapes alone; plan: types may still change."""
    n_tokens = settings.calibration_tokens if settings.calibration else 0
    disk = plan.nbytes + max(sum(tensor.nbytes for tensor in layer) for layer in plan.layers)  # and finished experts
    if n_tokens:
        disk += folder_bytes(checkpoint, n_tokens, settings.measures_sensitivity)
    memory = peak_bytes(checkpoint, settings, n_tokens, tuning_bytes_per_weight(settings))
    return Needs(memory, disk, estimated_seconds(checkpoint, settings, n_tokens))


def convert(settings: Settings) -> Report:
    """Convert as the settings say; the output appears under its name only when complete and checked."""
    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
    return_what_is_freed()
    checkpoint, plan = plan_conversion(settings)
    check_output(settings.out, settings.overwrite, plan.nbytes)
    require_memory(needs(settings, checkpoint, plan).memory, settings)
    tokens = _calibration_tokens(settings, checkpoint)
    with work_folder(settings, checkpoint) as work:
        stages = _Stages(settings, checkpoint, LayerStream(checkpoint), work)
        stages.require_disk(plan)
        observed_tokens = _check_tokens(checkpoint) if tokens is None else tokens[:OBSERVED_SEQUENCES]
        smoothing = stages.smoothing(observed_tokens, learns=tokens is not None)
        model = stages.smoothed_model(smoothing)
        sensitivity = None
        if tokens is not None and settings.measures_sensitivity:
            sensitivity = stages.sensitivity(model, tokens)
            plan = stages.mixed_types(plan, sensitivity)
        findings = ModelWriter(settings, plan, model, stages.stream, work, tokens, sensitivity).write()
        check = None
        if smoothing.logits is not None:
            tokenizer = checkpoint.tokenizer
            check = check_file(work.part, observed_tokens[0], smoothing.logits, tokenizer, settings.threads)
        nbytes = work.part.stat().st_size
        publish(work.part, settings.out)
    seconds = time.perf_counter() - started
    return Report(plan, str(settings.out), findings, smoothing.learned, check, nbytes, seconds)


def _calibration_tokens(settings: Settings, checkpoint: Checkpoint) -> Tensor | None:
    if settings.calibration is None:
        warn("no --calibration text: the rotation is random and the clustering looks at the weights only")
        return None
    return read_tokens(checkpoint, settings.calibration, settings.calibration_tokens)


def _check_tokens(checkpoint: Checkpoint) -> Tensor:
    return torch.tensor([tokenize(checkpoint, CHECK_TEXT, special=True)])


@dataclass(frozen=True)
class _Smoothing:
    """Which rotation the model gets, and what the check at the end compares with.

    rotation [hidden, hidden], or None; learned: the same with what learning it did, if it was learned; logits [n,
    vocab]: the original's of the first observed sequence, None without a check.
    """

    rotation: Tensor | None
    learned: LearnedRotation | None
    logits: Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """As the work folder keeps it."""
        found = self.learned
        learned = [found.loss_start, found.loss_end, found.steps] if found else None
        return {"rotation": self.rotation, "learned": learned, "logits": self.logits}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> _Smoothing:
        """Inverse of state_dict."""
        learned = LearnedRotation(saved["rotation"], *saved["learned"]) if saved["learned"] else None
        return cls(saved["rotation"], learned, saved["logits"])


@dataclass(frozen=True)
class _Stages:
    """The stages before anything is written; each goes on from what the work folder has of it."""

    settings: Settings
    checkpoint: Checkpoint
    stream: LayerStream
    work: WorkFolder

    def require_disk(self, plan: Plan) -> None:
        """CQError unless the work folder's disk has room for the conversion."""
        require_free(self.work.path, needs(self.settings, self.checkpoint, plan).disk)

    def smoothing(self, tokens: Tensor, learns: bool) -> _Smoothing:
        """Choose the rotation; learns: from what tokens [sequences, n] show of the original, unless settings differ."""
        saved = self.work.load("rotation")
        if saved is not None:
            return _Smoothing.from_state_dict(saved)
        learns = learns and self.settings.rotation == "learned"
        observed = observe(self._model(), self.stream, tokens) if learns or self.settings.check else None
        learned = self._learn(observed) if observed and learns else None
        rotation = learned.rotation if learned else self._random_rotation()
        found = _Smoothing(rotation, learned, observed.logits if observed and self.settings.check else None)
        self.work.save("rotation", found.state_dict())
        return found

    def smoothed_model(self, smoothing: _Smoothing) -> TransformedModel:
        """The model with its rotations, if any."""
        if smoothing.rotation is None:
            return self._model()
        heads = random_rotation(value_dim_of(self.checkpoint.config), self.settings.seed)
        return self._model().rotated(smoothing.rotation, heads)

    def sensitivity(self, model: TransformedModel, tokens: Tensor) -> Sensitivity:
        """What errors in every linear's output would do."""
        return measure(model, self.stream, tokens, self.work, self.settings.seed, self.settings.router_weight)

    def mixed_types(self, plan: Plan, sensitivity: Sensitivity) -> Plan:
        """The plan with types chosen by sensitivity, unless --bits has chosen; CQError if the disk has no room."""
        if self.settings.bits is not None:
            return plan
        has_experts = self.checkpoint.arch.n_experts(self.checkpoint.config) > 0
        target = self.settings.target_bpw or default_bpw(plan, has_experts)
        mixed = allocate(plan, sensitivity.predicted_kl, self.settings, target)
        self.require_disk(mixed)
        return mixed

    def _model(self) -> TransformedModel:
        """Folded and permuted, not rotated."""
        grouped = self.settings.grouping.group_size != -1 and self.settings.permutation
        return TransformedModel(self.checkpoint, permute_block=self.settings.grouping.group_size if grouped else 0)

    def _random_rotation(self) -> Tensor | None:
        if self.settings.rotation == "none":
            return None
        return random_rotation(self.checkpoint.config.hidden_size, self.settings.seed)

    def _learn(self, observed: Observation) -> LearnedRotation:
        start = random_rotation(self.checkpoint.config.hidden_size, self.settings.seed)
        return learn_rotation(observed.norm_rows, start, self.settings.activation_bits, self.settings.seed)

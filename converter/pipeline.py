"""The order of the stages: open, plan, observe, learn the rotation, then quantize and write layer after layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyggml_bridge.output import publish

from .calibrate.fisher import Sensitivity, folder_bytes, measure
from .calibrate.hessian import Hessian
from .calibrate.layer_stream import LayerStream
from .calibrate.observe import Observation, observe
from .calibrate.tokens import read_tokens, tokenize
from .console import warn
from .estimate.duration import estimated_seconds
from .estimate.memory import peak_bytes, require_memory, return_what_is_freed
from .output.check import check_file
from .output.gguf_file import OutputFile, check_output, require_free
from .output.metadata import metadata
from .quantize.budget import allocate, default_bpw
from .quantize.layers import LayerQuantizer
from .quantize.matrix import Quantized, QuantizedExperts, quantize
from .quantize.paper.centroid_tuning import CentroidTuner
from .quantize.plan import Plan, PlannedTensor, make_plan
from .quantize.task_pool import run_tasks
from .report import Report
from .resume.work_folder import WorkFolder, work_folder
from .resume.written import Written
from .settings import Settings
from .source.architecture import value_dim_of
from .source.checkpoint import GGUF_BIASES, HEAD_BIAS, Checkpoint
from .source.open_checkpoint import open_checkpoint
from .source.rope import rope_tensors
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


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion takes at its peak, of memory and of disk in the work folder; about how many seconds."""

    memory: int
    disk: int
    seconds: float


def needs(settings: Settings, checkpoint: Checkpoint, plan: Plan) -> Needs:
    """From shapes alone; plan: types may still change."""
    n_tokens = settings.calibration_tokens if settings.calibration else 0
    disk = plan.nbytes + max(sum(tensor.nbytes for tensor in layer) for layer in plan.layers)  # and finished experts
    if n_tokens:
        disk += folder_bytes(checkpoint, n_tokens, settings.measures_sensitivity)
    seconds = estimated_seconds(checkpoint, settings, n_tokens)
    return Needs(peak_bytes(checkpoint, settings, n_tokens), disk, seconds)


def convert(settings: Settings) -> Report:
    """Convert as the settings say; the output appears under its name only when complete and checked."""
    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
    return_what_is_freed()
    checkpoint, plan = plan_conversion(settings)
    check_output(settings.out, settings.overwrite, plan.nbytes)
    require_memory(needs(settings, checkpoint, plan).memory, settings)
    job = _Job(settings, checkpoint, plan, Report(plan, str(settings.out)))
    job.run()
    job.report.seconds = time.perf_counter() - started
    return job.report


@dataclass
class _Job:
    settings: Settings
    checkpoint: Checkpoint
    plan: Plan
    report: Report

    def run(self) -> None:
        tokens = self._calibration_tokens()
        self.stream = LayerStream(self.checkpoint)
        grouped = self.settings.grouping.group_size != -1 and self.settings.permutation
        permute_block = self.settings.grouping.group_size if grouped else 0
        self.model = TransformedModel(self.checkpoint, permute_block=permute_block)
        with work_folder(self.settings, self.checkpoint) as work:
            self._require_disk(work)
            observed_tokens = self._check_tokens() if tokens is None else tokens[:OBSERVED_SEQUENCES]
            logits = self._rotate(work, observed_tokens, learns=tokens is not None)
            sensitivity = self._sensitivity(work, tokens)
            self._write(work, tokens, sensitivity)
            self.report.nbytes = work.part.stat().st_size
            if logits is not None:
                tokenizer, n_threads = self.checkpoint.tokenizer, self.settings.threads
                self.report.check = check_file(work.part, observed_tokens[0], logits, tokenizer, n_threads)
            publish(work.part, self.settings.out)

    def _require_disk(self, work: WorkFolder) -> None:
        require_free(work.path, needs(self.settings, self.checkpoint, self.plan).disk)

    def _calibration_tokens(self) -> Tensor | None:
        if self.settings.calibration is None:
            warn("no --calibration text: the rotation is random and the clustering looks at the weights only")
            return None
        return read_tokens(self.checkpoint, self.settings.calibration, self.settings.calibration_tokens)

    def _check_tokens(self) -> Tensor:
        return torch.tensor([tokenize(self.checkpoint, CHECK_TEXT, special=True)])

    def _rotate(self, work: WorkFolder, tokens: Tensor, learns: bool) -> Tensor | None:
        """Put the model into its new basis; the original's logits [n, vocab] of the first sequence for the check."""
        saved = work.load("rotation")
        if saved is None:
            observed = self._observe(tokens, learns)
            rotation, learned = self._rotation(observed if learns else None)
            logits = observed.logits if observed and self.settings.check else None
            saved = {"rotation": rotation, "learned": learned, "logits": logits}
            work.save("rotation", saved)
        if saved["learned"]:
            self.report.rotation = LearnedRotation(saved["rotation"], *saved["learned"])
        if saved["rotation"] is not None:
            heads = random_rotation(value_dim_of(self.checkpoint.config), self.settings.seed)
            self.model = self.model.rotated(saved["rotation"], heads)
        return saved["logits"]

    def _observe(self, tokens: Tensor, learns: bool) -> Observation | None:
        if not self.settings.check and not (learns and self.settings.rotation == "learned"):
            return None
        return observe(self.model, self.stream, tokens)

    def _rotation(self, observed: Observation | None) -> tuple[Tensor | None, list[Any] | None]:
        """The matrix, and what learning it did."""
        if self.settings.rotation == "none":
            return None, None
        start = random_rotation(self.checkpoint.config.hidden_size, self.settings.seed)
        if observed is None or self.settings.rotation == "random":
            return start, None
        found = learn_rotation(observed.norm_rows, start, self.settings.activation_bits, self.settings.seed)
        return found.rotation, [found.loss_start, found.loss_end, found.steps]

    def _sensitivity(self, work: WorkFolder, tokens: Tensor | None) -> Sensitivity | None:
        """Measured, and types mixed by it."""
        if tokens is None or not self.settings.measures_sensitivity:
            return None
        found = measure(self.model, self.stream, tokens, work, self.settings.seed, self.settings.router_weight)
        if self.settings.bits is None:
            has_experts = self.checkpoint.arch.n_experts(self.checkpoint.config) > 0
            target = self.settings.target_bpw or default_bpw(self.plan, has_experts)
            self.plan = self.report.plan = allocate(self.plan, found.predicted_kl, self.settings, target)
            self._require_disk(work)
        return found

    def _write(self, work: WorkFolder, tokens: Tensor | None, sensitivity: Sensitivity | None) -> None:
        """The output file, on from the last layer that it holds."""
        written = Written.load(work)
        n_tensors = len(self.plan.first) + sum(map(len, self.plan.layers[: written.n_layers])) if written else 0
        keys = metadata(self.checkpoint, self.settings, self.plan, 0 if tokens is None else tokens.numel())
        file = OutputFile(work.part, self.checkpoint.arch.gguf_name, keys, self.plan.tensors, n_tensors)
        try:
            written = written or self._write_first(file, tokens)
            self._write_layers(file, work, written, sensitivity)
            self._write_last(file, written.hidden)
            file.close()
        except BaseException:
            file.abandon()
            raise

    def _write_first(self, file: OutputFile, tokens: Tensor | None) -> Written:
        *_, planned_embedding = self.plan.first
        for planned, factors in zip(self.plan.first, rope_tensors(self.checkpoint.config).values(), strict=False):
            file.write(planned, [factors])
        embedding = self._quantize(planned_embedding, self.model.embedding())
        self._write_tensor(file, embedding)
        written = Written(rel_errors=self.report.rel_errors)
        if tokens is not None and self.settings.float_type is None:
            written.hidden = embedding.rows(tokens, self.settings.threads)
            if self.settings.tunes_centroids:
                written.original_hidden = self.model.embedding()[tokens]
        return written

    def _write_layers(
        self, file: OutputFile, work: WorkFolder, written: Written, sensitivity: Sensitivity | None
    ) -> None:
        """Hidden states follow through the already quantized layers."""
        report = self.report
        report.rel_errors, report.experts, report.tuned = written.rel_errors, written.experts, written.tuned
        tuner = None  # the published method's; what `full` does instead follows from the second moments
        if written.original_hidden is not None:
            tuner = CentroidTuner(written.original_hidden, self.settings.router_weight, self.settings.seed)
        quantizer = LayerQuantizer(self.settings, self.plan, self.model, self.stream, work.path, sensitivity, tuner)
        for layer in quantizer.layers(written.hidden, written.n_layers):
            for quantized in layer.tensors.values():
                self._write_tensor(file, quantized)
            if layer.tuned:
                report.tuned.append(layer.tuned)
            if layer.tokens:
                report.experts.append({"layer": written.n_layers, "tokens": layer.tokens})
            file.flush()
            written.n_layers += 1
            written.save(work)
            del layer  # else it would stay while the next one is made

    def _write_last(self, file: OutputFile, hidden: Tensor | None) -> None:
        """hidden: the calibration's, behind the last layer."""
        norm, *biases, planned_head = self.plan.last
        self._write_tensor(file, self._quantize(norm, torch.ones(norm.shape)))
        for planned in biases:  # the head's takes in the final norm's, which leaves zero
            bias = self.model.head_bias() if planned.name == GGUF_BIASES[HEAD_BIAS] else None
            self._write_tensor(file, self._quantize(planned, torch.zeros(planned.shape) if bias is None else bias))
        inputs = None if hidden is None else Hessian.of_rows(self.stream.final_norm(hidden).flatten(0, 1))
        self._write_tensor(file, self._quantize(planned_head, self.model.head(), inputs))

    def _quantize(self, planned: PlannedTensor, weight: Tensor, inputs: Hessian | None = None) -> Quantized:
        quantized, tasks = quantize(planned, weight, inputs, None, self.settings.refinement)
        run_tasks(tasks, self.settings.threads)
        return quantized

    def _write_tensor(self, file: OutputFile, quantized: Quantized | QuantizedExperts) -> None:
        file.write(quantized.planned, quantized.arrays())
        if len(quantized.planned.shape) > 1:
            self.report.rel_errors[quantized.planned.name] = quantized.rel_error(self.settings.threads)

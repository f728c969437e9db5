"""The order of the stages: open, plan, observe, learn the rotation, then quantize and write layer after layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from pyggml_bridge.output import complete_file

from .accf import CentroidTuner
from .architecture import head_dim_of
from .budget import allocate, default_bpw
from .calibration import read_tokens, tokenize
from .check import check_file
from .checkpoint import Checkpoint, open_checkpoint
from .layers import LayerQuantizer
from .metadata import metadata
from .moments import Moments
from .observe import Observation, observe
from .plan import Plan, PlannedTensor, make_plan
from .quantize import Quantized, quantize
from .report import Report, warn
from .rope import rope_freqs
from .rotation import learn_rotation, random_rotation
from .sensitivity import Sensitivity, folder_bytes, measure
from .settings import Settings
from .side_by_side import run_tasks
from .stream import LayerStream
from .transform import TransformedModel
from .write import OutputFile, check_output, require_free

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


def convert(settings: Settings) -> Report:
    """Convert as the settings say; the output appears under its name only when complete and checked."""
    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
    checkpoint, plan = plan_conversion(settings)
    check_output(settings.out, settings.overwrite, plan.nbytes)
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
        observed_tokens = self._check_tokens() if tokens is None else tokens[:OBSERVED_SEQUENCES]
        observed = self._observe(observed_tokens, learns=tokens is not None)
        if self.settings.rotation != "none":
            heads = random_rotation(head_dim_of(self.checkpoint.config), self.settings.seed)
            self.model = self.model.rotated(self._rotation(None if tokens is None else observed), heads)
        with complete_file(self.settings.out) as part, self._sensitivity(tokens) as sensitivity:
            if sensitivity and self.settings.bits is None:
                self._mix_types(sensitivity)
            keys = metadata(self.checkpoint, self.settings, self.plan, 0 if tokens is None else tokens.numel())
            file = OutputFile(part, self.checkpoint.arch.gguf_name, keys, self.plan.tensors)
            try:
                self._write(file, tokens, sensitivity)
                file.close()
            except BaseException:
                file.abandon()
                raise
            self.report.nbytes = part.stat().st_size
            if observed and self.settings.check:
                tokenizer = self.checkpoint.tokenizer
                self.report.check = check_file(
                    part, observed_tokens[0], observed.logits, tokenizer, self.settings.threads
                )

    def _calibration_tokens(self) -> Tensor | None:
        if self.settings.calibration is None:
            warn("no --calibration text: the rotation is random and the clustering looks at the weights only")
            return None
        return read_tokens(self.checkpoint, self.settings.calibration, self.settings.calibration_tokens)

    def _check_tokens(self) -> Tensor:
        return torch.tensor([tokenize(self.checkpoint, CHECK_TEXT, special=True)])

    def _observe(self, tokens: Tensor, learns: bool) -> Observation | None:
        if not self.settings.check and not (learns and self.settings.rotation == "learned"):
            return None
        return observe(self.model, self.stream, tokens)

    def _rotation(self, observed: Observation | None) -> Tensor:
        start = random_rotation(self.checkpoint.config.hidden_size, self.settings.seed)
        if observed is None or self.settings.rotation == "random":
            return start
        self.report.rotation = learn_rotation(
            observed.norm_rows, start, self.settings.activation_bits, self.settings.seed
        )
        return self.report.rotation.rotation

    @contextmanager
    def _sensitivity(self, tokens: Tensor | None) -> Iterator[Sensitivity | None]:
        """Measured into a folder beside the output, which goes when the work is done or interrupted."""
        out = self.settings.out
        if tokens is None or not self.settings.measures_sensitivity:
            yield None
            return
        with TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as folder:
            require_free(out.parent, self.plan.nbytes + folder_bytes(self.model, tokens.numel()))
            yield measure(
                self.model, self.stream, tokens, Path(folder), self.settings.seed, self.settings.router_weight
            )

    def _mix_types(self, sensitivity: Sensitivity) -> None:
        has_experts = any(linear.experts for linear in self.checkpoint.arch.linears)
        target = self.settings.target_bpw or default_bpw(self.plan, has_experts)
        self.plan = self.report.plan = allocate(self.plan, sensitivity.damage, self.settings, target)
        require_free(self.settings.out.parent, self.plan.nbytes)

    def _write(self, file: OutputFile, tokens: Tensor | None, sensitivity: Sensitivity | None) -> None:
        """Every tensor in the plan's order; hidden states follow through the already quantized layers."""
        *_, planned_embedding = self.plan.first
        freqs = rope_freqs(self.checkpoint.config)
        if freqs is not None:
            file.write(self.plan.first[0], [freqs])
        embedding = self._quantize(planned_embedding, self.model.embedding())
        self._write_tensor(file, embedding)
        table = embedding.weight(self.settings.threads)
        norm, planned_head = self.plan.last
        quantizer = LayerQuantizer(self.settings, self.plan, self.model, self.stream, sensitivity, self._tuner(tokens))
        hidden = None if tokens is None else table[tokens]  # becomes each layer's output, then the final norm's input
        layers = quantizer.layers(hidden)
        for index, layer in enumerate(layers):
            for quantized in layer.tensors.values():
                self._write_tensor(file, quantized)
            if layer.tuned:
                self.report.tuned.append(layer.tuned)
            if layer.tokens:
                self.report.experts.append({"layer": index, "tokens": layer.tokens})
        self._write_tensor(file, self._quantize(norm, torch.ones(norm.shape)))
        inputs = None if hidden is None else Moments.of_rows(self.stream.final_norm(hidden).flatten(0, 1))
        self._write_tensor(file, self._quantize(planned_head, self.model.head(), inputs))

    def _quantize(self, planned: PlannedTensor, weight: Tensor, inputs: Moments | None = None) -> Quantized:
        moments = None if inputs is None else [inputs]
        quantized, tasks = quantize(planned, weight, moments, None, self.settings.refinement)
        run_tasks(tasks, self.settings.threads)
        return quantized

    def _write_tensor(self, file: OutputFile, quantized: Quantized) -> None:
        file.write(quantized.planned, quantized.arrays())
        if len(quantized.planned.shape) > 1:
            self.report.rel_errors[quantized.planned.name] = quantized.rel_error(self.settings.threads)

    def _tuner(self, tokens: Tensor | None) -> CentroidTuner | None:
        """The published method's; what `full` does instead follows from the second moments."""
        if tokens is None or self.settings.method != "paper" or not self.settings.finetune:
            return None
        return CentroidTuner(self.model.embedding()[tokens], self.settings.router_weight, self.settings.seed)

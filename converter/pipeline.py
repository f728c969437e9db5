"""The order of the stages: open, plan, observe, learn the rotation, then quantize and write layer after layer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pyggml_bridge.output import complete_file

from .architecture import Layer, Linear, head_dim_of
from .basis import FileBasis
from .calibration import Moments, Statistics, capture, read_tokens, tokenize
from .check import check_file
from .checkpoint import Checkpoint, open_checkpoint
from .metadata import metadata
from .observe import Observation, observe
from .plan import Plan, PlannedTensor, make_plan
from .quantize import quantize
from .report import Report, progress, warn
from .rope import rope_freqs
from .rotation import learn_rotation, random_rotation
from .settings import Settings
from .stream import LayerStream
from .transform import TransformedModel
from .write import OutputFile, check_output

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
        keys = metadata(self.checkpoint, self.settings, self.plan, 0 if tokens is None else tokens.numel())
        self.stream = LayerStream(self.checkpoint)
        grouped = self.settings.grouping.group_size != -1 and self.settings.permutation
        permute_block = self.settings.grouping.group_size if grouped else 0
        self.model = TransformedModel(self.checkpoint, permute_block=permute_block)
        observed_tokens = self._check_tokens() if tokens is None else tokens[:OBSERVED_SEQUENCES]
        observed = self._observe(observed_tokens, learns=tokens is not None)
        if self.settings.rotation:
            heads = random_rotation(head_dim_of(self.checkpoint.config), self.settings.seed)
            self.model = self.model.rotated(self._rotation(None if tokens is None else observed), heads)
        with complete_file(self.settings.out) as part:
            file = OutputFile(part, self.checkpoint.arch.gguf_name, keys, self.plan.tensors)
            try:
                self._write(file, tokens)
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
        if not self.settings.check and not (learns and self.settings.rotation):
            return None
        return observe(self.model, self.stream, tokens)

    def _rotation(self, observed: Observation | None) -> Tensor:
        start = random_rotation(self.checkpoint.config.hidden_size, self.settings.seed)
        if observed is None:
            return start
        self.report.rotation = learn_rotation(
            observed.norm_rows, start, self.settings.activation_bits, self.settings.seed
        )
        return self.report.rotation.rotation

    def _write(self, file: OutputFile, tokens: Tensor | None) -> None:
        """Every tensor in the plan's order; hidden states follow through the already quantized layers."""
        *_, embedding = self.plan.first
        freqs = rope_freqs(self.checkpoint.config)
        if freqs is not None:
            file.write(self.plan.first[0], [freqs])
        table = self._write_tensor(file, embedding, self.model.embedding())
        hidden = None if tokens is None else table[tokens]
        with progress("clustering", len(self.plan.layers)) as advance:
            for i, planned_layer in enumerate(self.plan.layers):
                self._write_layer(file, i, planned_layer, hidden)
                advance(f"layer {i}")
        norm, head = self.plan.last
        self._write_tensor(file, norm, torch.ones(norm.shape))
        self._write_tensor(file, head, self.model.head())

    def _write_layer(
        self, file: OutputFile, index: int, planned: tuple[PlannedTensor, ...], hidden: Tensor | None
    ) -> None:
        layer = self.model.layer(index)
        statistics: Statistics = {}
        if hidden is not None:
            module = self.stream.module(index, layer)
            with capture(
                self.checkpoint.arch, module, self.checkpoint.arch.n_experts(self.checkpoint.config)
            ) as statistics:
                self.stream.forward(module, hidden.clone())
            self._count_experts(index, statistics)
        arch = self.checkpoint.arch
        quantized: Layer = {norm.name: layer[norm.name] for norm in arch.norms}
        for norm, tensor in zip(arch.norms, planned, strict=False):
            file.write(tensor, [layer[norm.name].numpy()])
        for linear, tensor in zip(arch.linears, planned[len(arch.norms) :], strict=True):
            quantized[linear.name] = self._write_linear(file, tensor, linear, layer[linear.name], statistics)
        if hidden is not None:
            arch.install(module, quantized)
            self.stream.forward(module, hidden)

    def _write_linear(
        self, file: OutputFile, planned: PlannedTensor, linear: Linear, weight: Tensor, statistics: Statistics
    ) -> Tensor:
        """Write one linear in the file's basis; returns what it has become, in transformers'."""
        basis = FileBasis(
            getattr(self.checkpoint.config, linear.rope_heads) if linear.rope_heads else 0,
            self.plan.hadamard if linear.hadamard else 0,
        )
        moments = [entry.in_basis(basis) for entry in statistics.get(linear.site, ())]
        return basis.from_file(self._write_tensor(file, planned, basis.to_file(weight), moments))

    def _write_tensor(
        self,
        file: OutputFile,
        planned: PlannedTensor,
        weight: Tensor,
        moments: list[Moments] | None = None,
    ) -> Tensor:
        result = quantize(planned, weight, moments, self.settings.refinement, self.settings.threads)
        file.write(planned, result.arrays)
        if len(planned.shape) > 1:
            self.report.rel_errors[planned.name] = result.rel_error
        return result.weight

    def _count_experts(self, index: int, statistics: Statistics) -> None:
        site = next((linear.site for linear in self.checkpoint.arch.linears if linear.experts), None)
        if site:
            self.report.experts.append({"layer": index, "tokens": [entry.tokens for entry in statistics[site]]})

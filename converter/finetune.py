"""Stage 4: centroids and scales tuned on the whole model, so that its output stays close to the original's.

Assignments stay as they are. The loss is the mean KL divergence of the next-token distributions, original after
quantized, as in a distillation; a gradient by a weight goes to its centroid, its group scale and its row scale.
Masters are real numbers; what the model computes with is always rounded as the file is.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .architecture import Linear
from .checkpoint import Checkpoint
from .clustering import Fit, gradient_of
from .layers import LayerQuantizer, QuantizedLayer
from .plan import Plan
from .quantize import Quantized
from .report import Tuned, progress

CENTROID_STEP = 0.04  # Adam's, in steps of int8; group scales likewise
SCALE_STEP = 1e-4  # of the logarithm of a row's scale
WARM_UP = 5
SEQUENCES_PER_STEP = 2
HELD_OUT = 2  # sequences that only measure
MAX_STEPS = 48
MIN_STEPS = 8
BYTES_PER_PARAMETER = 24  # original, quantized and gradient in float32, moments, indices, temporaries
MAX_FLOPS = 4e13  # bounds the time on large models; not a clock, so that a seed gives one result


class _Master:
    """Real-valued centroids, group scales and logarithm of the row scales of one fit."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.start = fit, fit.scales.copy()
        self.saved = [None if array is None else array.copy() for array in (fit.centroids, fit.group_scales)]
        self.centroids = torch.from_numpy(fit.centroids.astype(np.float32))
        self.groups = None if fit.group_scales is None else torch.from_numpy(fit.group_scales.astype(np.float32))
        self.log_scales = torch.zeros(len(fit.scales))

    def integers(self) -> list[Tensor]:
        return [self.centroids] if self.groups is None else [self.centroids, self.groups]

    def take_gradient(self, gradient: Tensor, n_threads: int) -> None:
        found = gradient_of(self.fit, gradient.numpy(), n_threads)
        self.centroids.grad = torch.from_numpy(found.centroids)
        if self.groups is not None:
            self.groups.grad = torch.from_numpy(found.group_scales)
        self.log_scales.grad = torch.from_numpy(found.scales * self.fit.scales)

    def restore(self) -> None:
        """Put back what the fit held at first."""
        self.fit.scales[:] = self.start
        for array, saved in zip((self.fit.centroids, self.fit.group_scales), self.saved, strict=True):
            if array is not None and saved is not None:
                array[:] = saved

    def round(self) -> None:
        """Write the file's integers and scales."""
        self.fit.centroids[:] = self.centroids.clamp_(-127, 127).round().numpy()
        if self.groups is not None and self.fit.group_scales is not None:
            self.fit.group_scales[:] = self.groups.clamp_(0, 127).round().numpy()
        self.fit.scales[:] = self.start * self.log_scales.exp().numpy()


@dataclass
class _Target:
    """A clustered linear of the student: its parameter, and the masters of its matrices."""

    linear: Linear
    quantized: Quantized
    parameter: nn.Parameter
    masters: list[_Master]


class FineTuner:
    """Original and quantized model side by side, both whole in memory."""

    def __init__(
        self, quantizer: LayerQuantizer, layers: list[QuantizedLayer], embedding: Tensor, head: Tensor
    ) -> None:
        """Build the student from what the file will hold; embedding, head [vocab, hidden] as dequantized."""
        self.quantizer, self.n_threads = quantizer, quantizer.settings.threads
        self.checkpoint = quantizer.model.checkpoint
        self.teacher = self.checkpoint.model()
        self.student = self._student(layers, embedding, head)
        self.targets = [target for i, layer in enumerate(layers) for target in self._targets(i, layer)]

    def _student(self, layers: list[QuantizedLayer], embedding: Tensor, head: Tensor) -> nn.Module:
        config = copy.deepcopy(self.checkpoint.config)
        config.tie_word_embeddings = False
        student = type(self.teacher)(config).eval().requires_grad_(False)
        decoder = student.get_decoder()
        student.get_input_embeddings().weight.copy_(embedding)
        student.get_output_embeddings().weight.copy_(head)
        decoder.norm.weight.fill_(1)
        for module, layer in zip(decoder.layers, layers, strict=True):
            self.checkpoint.arch.install(module, self.quantizer.effective(layer.tensors))
        return student

    def _targets(self, index: int, layer: QuantizedLayer) -> Iterator[_Target]:
        module = self.student.get_decoder().layers[index]
        for linear in self.checkpoint.arch.linears:
            quantized = layer.tensors[linear.name]
            if quantized.fits:
                parameter = module.get_parameter(linear.parameter).requires_grad_(True)
                yield _Target(linear, quantized, parameter, [_Master(fit) for fit in quantized.fits])

    def tune(self, tokens: Tensor, steps: int, seed: int) -> Tuned:
        """Descend on tokens [sequences, n], a few a step; the fits change in place.

        The last sequences are held out; if the loss on them does not fall, everything stays as it was.
        """
        held, tokens = tokens[-HELD_OUT:], tokens[:-HELD_OUT]
        with torch.no_grad():
            start = float(self._loss(held))
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        optimizer = self._optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        with progress("fine-tuning", steps) as advance:
            for step in range(steps):
                chosen = torch.arange(step * SEQUENCES_PER_STEP, (step + 1) * SEQUENCES_PER_STEP) % len(tokens)
                loss = self._loss(tokens[order[chosen]])
                loss.backward()
                self._gather_gradients()
                optimizer.step()
                schedule.step()
                self._install()
                advance(f"KL {float(loss.detach()):.4f}")
        with torch.no_grad():
            end = float(self._loss(held))
        if end < start:
            return Tuned(steps, start, end)
        for target in self.targets:
            for master in target.masters:
                master.restore()
        return Tuned(steps, start, start)

    def _optimizer(self) -> torch.optim.Adam:
        masters = [master for target in self.targets for master in target.masters]
        integers = [tensor for master in masters for tensor in master.integers()]
        groups = [
            {"params": integers, "lr": CENTROID_STEP},
            {"params": [master.log_scales for master in masters], "lr": SCALE_STEP},
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)

    def _loss(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits.log_softmax(dim=-1)
        found = self.student(input_ids=tokens, use_cache=False).logits.log_softmax(dim=-1)
        return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / tokens.numel()

    def _gather_gradients(self) -> None:
        for target in self.targets:
            assert target.parameter.grad is not None
            basis = self.quantizer.basis(target.linear)
            gradient = basis.to_file(target.linear.rows_of(target.parameter.grad)).contiguous()
            matrices = gradient.reshape(len(target.masters), -1, gradient.shape[-1])
            for master, matrix in zip(target.masters, matrices, strict=True):
                master.take_gradient(matrix, self.n_threads)
        for target in self.targets:
            target.parameter.grad = None

    def _install(self) -> None:
        with torch.no_grad():
            for target in self.targets:
                for master in target.masters:
                    master.round()
                weight = self.quantizer.basis(target.linear).from_file(target.quantized.weight(self.n_threads))
                target.linear.rows_of(target.parameter).copy_(weight)


def step_count(plan: Plan, checkpoint: Checkpoint, tokens: Tensor) -> int:
    """Steps that the time allows; 0 where they would be too few to be worth anything, or text or memory too small."""
    experts = sum(t.n_weights for t in plan.tensors if len(t.shape) == 3)
    total = sum(t.n_weights for t in plan.tensors)
    config = checkpoint.config
    share = config.num_experts_per_tok / checkpoint.arch.n_experts(config) if experts else 1.0
    active = total - experts * (1 - share)
    if len(tokens) < HELD_OUT + SEQUENCES_PER_STEP:
        return 0
    if BYTES_PER_PARAMETER * total > available_memory():
        return 0
    per_step = 8 * active * SEQUENCES_PER_STEP * tokens.shape[1]  # two forward passes and a backward one
    steps = min(MAX_STEPS, int(MAX_FLOPS / per_step))
    return steps if steps >= MIN_STEPS else 0


def available_memory() -> int:
    """Bytes that can be used without swapping; where the system does not say, all that the machine has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

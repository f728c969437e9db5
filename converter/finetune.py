"""Stage 4: centroids and scales tuned on the whole model, so that its output stays close to the original's.

Assignments stay as they are. The loss is the mean KL divergence of the next-token distributions, original after
quantized, as in a distillation; a gradient by a weight goes to its centroid, its group scale and its row scale.
Centroids and group scales are real numbers meanwhile, rounded once at the end.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .architecture import Linear
from .checkpoint import Checkpoint
from .clustering import Fit, RealFit, gradient_of, real_weights_of, weights_of
from .layers import LayerQuantizer, QuantizedLayer
from .plan import Plan
from .quantize import Quantized
from .report import Tuned, progress

STEP = 0.04  # Adam's, in steps of int8
BETAS = (0.9, 0.95)
WARM_UP = 5
SEQUENCES_PER_STEP = 2
HELD_OUT = 2  # sequences that only measure
MAX_STEPS = 48
MIN_STEPS = 8
BYTES_PER_PARAMETER = 24  # original, quantized and gradient in float32, moments, indices, temporaries
MAX_FLOPS = 4e13  # bounds the time on large models; not a clock, so that a seed gives one result


class _Master:
    """Real-valued centroids and group scales of one fit, in steps of int8."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.real = fit, RealFit.of(fit)
        arrays = (self.real.centroids, self.real.group_scales)
        self.parameters = [torch.from_numpy(array) for array in arrays if array is not None]

    def take_gradient(self, gradient: Tensor, n_threads: int) -> None:
        found = gradient_of(self.fit, gradient.numpy(), n_threads)
        arrays = (found.centroids, found.group_scales)
        for parameter, array in zip(self.parameters, (a for a in arrays if a is not None), strict=True):
            parameter.grad = torch.from_numpy(array)

    def round(self, generator: np.random.Generator) -> None:
        """Write the file's integers. Rounded at random, so that steps below one half are kept on average."""
        self.fit.centroids[:] = _rounded(self.real.centroids, -127, generator)
        if self.real.group_scales is not None and self.fit.group_scales is not None:
            self.fit.group_scales[:] = _rounded(self.real.group_scales, 0, generator)


def _rounded(values: NDArray[np.float32], lowest: int, generator: np.random.Generator) -> NDArray[np.float32]:
    return np.floor(values + generator.random(values.shape, np.float32)).clip(lowest, 127)


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
        """Descend on tokens [sequences, n], a few a step; the fits change in place, once, at the end.

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
                self._install(lambda master: real_weights_of(master.fit, master.real, self.n_threads))
                advance(f"KL {float(loss.detach()):.4f}")
        return self._finish(held, Tuned(steps, start, start), np.random.default_rng(seed))

    def _finish(self, held: Tensor, undone: Tuned, generator: np.random.Generator) -> Tuned:
        masters = [master for target in self.targets for master in target.masters]
        fits = [master.fit.copy() for master in masters]
        for master in masters:
            master.round(generator)
        self._install(lambda master: weights_of(master.fit, self.n_threads))
        with torch.no_grad():
            end = float(self._loss(held))
        if end < undone.loss_start:
            return Tuned(undone.steps, undone.loss_start, end)
        for master, before in zip(masters, fits, strict=True):
            master.fit.take(before)
        return undone

    def _optimizer(self) -> torch.optim.Adam:
        parameters = [p for target in self.targets for master in target.masters for p in master.parameters]
        return torch.optim.Adam(parameters, lr=STEP, betas=BETAS, eps=1e-12)

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

    def _install(self, weights: Callable[[_Master], NDArray[np.float32]]) -> None:
        with torch.no_grad():
            for target in self.targets:
                stored = torch.stack([torch.from_numpy(weights(master)) for master in target.masters])
                weight = self.quantizer.basis(target.linear).from_file(stored.reshape(target.quantized.original.shape))
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

"""Calibration: text -> token sequences -> second moments of every linear's input, per expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyggml_bridge.errors import CQError

from .architecture import Architecture
from .basis import FileBasis
from .checkpoint import Checkpoint

SEQUENCE = 512
DAMPING = 0.1  # added to the second moments' diagonal, relative to its mean: lowest held-out error (docs/decisions.md)


def read_tokens(checkpoint: Checkpoint, file: Path, n_tokens: int) -> Tensor:
    """The first n_tokens of a text as int64 [sequences, 512 or all of them]; CQError if the text has fewer than 64."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CQError(f"{file}: not UTF-8 text") from error
    ids = tokenize(checkpoint, text[: n_tokens * 16])[:n_tokens]
    if len(ids) < 64:
        raise CQError(f"{file}: {len(ids)} tokens are too few to calibrate on (at least 64)")
    length = min(SEQUENCE, len(ids))
    tokens = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    if (
        checkpoint.tokenizer.bos_token_id is not None
        and tokenize(checkpoint, "a", True)[0] != tokenize(checkpoint, "a")[0]
    ):
        tokens[:, 0] = checkpoint.tokenizer.bos_token_id
    return tokens


def tokenize(checkpoint: Checkpoint, text: str, special: bool = False) -> list[int]:
    """Token ids of a text; CQError for an id outside the model's vocabulary."""
    ids: list[int] = checkpoint.tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids
    if ids and max(ids) >= checkpoint.config.vocab_size:
        raise CQError(
            f"{checkpoint.path}: the tokenizer gives id {max(ids)}, the model has {checkpoint.config.vocab_size}"
        )
    return ids


class Moments:
    """Second moments X^T X / tokens of one linear's input: float32 [cols, cols], with the number of tokens seen."""

    def __init__(self, cols: int) -> None:
        """Nothing seen yet."""
        self._sum = torch.zeros(cols, cols)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add rows x [tokens, cols]."""
        self._sum.addmm_(x.T, x)
        self.tokens += len(x)

    @cached_property
    def matrix(self) -> Tensor:
        """X^T X / tokens [cols, cols]; only once all rows have been added."""
        return self._sum / max(1, self.tokens)

    @cached_property
    def damped(self) -> Tensor:
        """The matrix with more on its diagonal, so that directions that the calibration did not show count too."""
        matrix = self.matrix.clone()
        damping = max(DAMPING * float(matrix.diagonal().mean()), torch.finfo(torch.float32).tiny)
        matrix.diagonal().add_(damping)
        return matrix

    @cached_property
    def feedback_factor(self) -> Tensor:
        """Upper Cholesky factor [cols, cols] of the inverse of damped."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped.double()))
        return torch.linalg.cholesky(inverse, upper=True).float().contiguous()

    def in_basis(self, basis: FileBasis) -> Moments:
        """The moments of the inputs that the file's weight multiplies."""
        if not basis.hadamard:
            return self
        moments = Moments(len(self._sum))
        moments._sum, moments.tokens = basis.moments(self._sum), self.tokens
        return moments

    def relative_error(self, weight: Tensor, quantized: Tensor) -> tuple[float, float]:
        """Squared output error and squared output norm over these inputs, for weights [rows, cols]."""
        delta = weight - quantized
        error, total = ((m @ self.matrix).mul_(m).sum(dtype=torch.float64) for m in (delta, weight))
        return float(error), float(total)


Statistics = dict[str, list[Moments]]  # site -> one entry, or one per expert


@contextmanager
def capture(arch: Architecture, module: nn.Module, n_experts: int) -> Iterator[Statistics]:
    """While active, running the decoder layer module fills the statistics of every site of its linears."""
    found: Statistics = {}
    handles = []
    for linear in arch.linears:
        if linear.router or linear.site in found:
            continue
        cols = linear.rows_of(module.get_parameter(linear.parameter)).shape[-1]
        found[linear.site] = [Moments(cols) for _ in range(n_experts if linear.experts else 1)]
        if not linear.experts:
            hook = _linear_hook(found[linear.site][0])
            handles.append(module.get_submodule(linear.site).register_forward_pre_hook(hook))
    experts_site = next((linear.site for linear in arch.linears if linear.experts), None)
    if experts_site:
        hook = _experts_hook(found[experts_site], found[f"{experts_site}.hidden"])
        handles.append(module.get_submodule(experts_site).register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(moments: Moments) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        moments.add(arguments[0].flatten(0, -2))

    return hook


def _experts_hook(inputs: list[Moments], hidden: list[Moments]) -> Any:
    """transformers keeps experts fused, so no hook sees one expert's input: gather it, and recompute gate and up."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        states, top_k_index = arguments[0].flatten(0, -2), arguments[1]
        for expert, (x_moments, h_moments) in enumerate(zip(inputs, hidden, strict=True)):
            x = states[(top_k_index == expert).any(dim=-1)]
            if len(x):
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                x_moments.add(x)
                h_moments.add(module.act_fn(gate) * up)

    return hook


@contextmanager
def capture_norms(arch: Architecture, module: nn.Module, rows: int) -> Iterator[list[Tensor]]:
    """While active, collects up to `rows` evenly spaced rows [rows, hidden] of each norm's output."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        flat = output.flatten(0, -2)
        found.append(flat[torch.linspace(0, len(flat) - 1, rows).long()].clone())

    names = [norm.parameter.removesuffix(".weight") for norm in arch.norms]
    handles = [module.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""Calibration: text -> token sequences -> second moments of every linear's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyggml_bridge.errors import CQError

from .architecture import Architecture
from .checkpoint import Checkpoint
from .moments import Moments

SEQUENCE = 512


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


@contextmanager
def capture(
    arch: Architecture, module: nn.Module, token_weights: dict[str, Tensor] | None = None
) -> Iterator[dict[str, Moments]]:
    """While active, running the decoder layer module fills the moments of every site but the experts'.

    token_weights: site -> [tokens], how much each token of the run counts; all the same without.
    """
    found: dict[str, Moments] = {}
    handles = []
    for linear in arch.linears:
        if not linear.measured or linear.experts or linear.site in found:
            continue
        cols = linear.rows_of(module.get_parameter(linear.parameter)).shape[-1]
        found[linear.site] = Moments(cols, sampled=True)
        weights = token_weights[linear.site] if token_weights else None
        hook = _linear_hook(found[linear.site], weights)
        handles.append(module.get_submodule(linear.site).register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook(moments: Moments, weights: Tensor | None) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)
        moments.add(x, None if weights is None else weights[moments.tokens : moments.tokens + len(x)])

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

"""Architectures: a module named like GGUF's general.architecture, with `build(weights, n_ctx) -> Program`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pyggml_bridge.errors import CQError
from pyggml_bridge.model import Model
from pyggml_bridge.native import default_threads
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights

DEFAULT_CTX = 8192


def architectures() -> list[str]:
    """Names that general.architecture may have."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_model(
    path: str | Path,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_batch: int = 512,
    *,
    cuda: bool = False,
    gpu_layers: int | None = None,
) -> Model:
    """Open a GGUF file for running; CQError naming the file if anything in it is missing or impossible.

    n_ctx: positions of the KV cache, by default what the model was trained for but at most 8192. cuda: on the GPU,
    with gpu_layers (None: all) of its layers.
    """
    file = GGUFFile(path)
    arch: str = file.get("general.architecture", str)
    if arch not in architectures():
        raise CQError(f"{path}: architecture {arch!r} is not supported (only {', '.join(architectures())})")
    trained: int = file.get(f"{arch}.context_length", int)
    if trained < 1:
        raise CQError(f"{path}: the key {arch}.context_length is {trained}")
    if n_ctx is None:
        n_ctx = min(trained, DEFAULT_CTX)
    build = importlib.import_module(f"{__name__}.{arch}").build
    program = build(Weights(file), n_ctx)
    n_threads = n_threads or default_threads()
    return Model(file, program, min(n_batch, n_ctx), n_threads, cuda=cuda, gpu_layers=gpu_layers)

"""Architectures: a module named like GGUF's general.architecture, with `build(weights, n_ctx) -> Program`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pyggml_bridge.decoder.hparams import HParams
from pyggml_bridge.errors import CQError
from pyggml_bridge.kv_cache import cache_bytes
from pyggml_bridge.machine import default_threads, require_memory, require_threads
from pyggml_bridge.model import Model
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights

DEFAULT_CTX = 8192
MAX_CTX = 2**31 - 1  # positions are int32
FLOAT = 4
TABLES = 3  # angles of rope: cosines and sines as they are computed, joined and scaled


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

    n_ctx: positions of the KV cache, 0 for what the model was trained for, by default the same but at most 8192. cuda:
    on the GPU, with gpu_layers (None: all) of its layers. CQError too if this machine lacks the memory or cannot start
    so many threads; nothing has been allocated then.
    """
    n_threads = n_threads or default_threads()
    require_threads(n_threads, "threads")
    file = GGUFFile(path)
    arch: str = file.get("general.architecture", str)
    if arch not in architectures():
        raise CQError(f"{path}: architecture {arch!r} is not supported (only {', '.join(architectures())})")
    trained: int = file.get(f"{arch}.context_length", int)
    if trained < 1:
        raise CQError(f"{path}: the key {arch}.context_length is {trained}")
    if not n_ctx:
        n_ctx = trained if n_ctx == 0 else min(trained, DEFAULT_CTX)
    weights = Weights(file)
    _require_context(weights, n_ctx, cuda)
    build = importlib.import_module(f"{__name__}.{arch}").build
    program = build(weights, n_ctx)
    weights.require_all_read()
    return Model(file, program, min(n_batch, n_ctx), n_threads, cuda=cuda, gpu_layers=gpu_layers)


def _require_context(weights: Weights, n_ctx: int, cuda: bool) -> None:
    """CQError unless there is memory for what grows with the context: rope's tables, and the KV cache on the CPU."""
    h = HParams.read(weights)
    needed = TABLES * FLOAT * n_ctx * h.n_rot
    if not cuda:  # the GPU's memory is counted where the program is placed on it
        latent = f"{h.arch}.attention.kv_lora_rank" in weights.file.metadata  # values are columns of the keys
        needed += cache_bytes(h.n_layers, h.n_kv_heads, n_ctx, h.head_dim, has_values=not latent)
    require_memory(needed, f"{weights.file.path}: a context of {n_ctx} positions")
    if n_ctx > MAX_CTX:
        raise CQError(f"{weights.file.path}: a context of {n_ctx} positions: expected at most {MAX_CTX}")

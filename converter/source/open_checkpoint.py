"""What the command line calls a model: a directory, a GGUF file or a hub id."""

from __future__ import annotations

from pathlib import Path

from pyggml_bridge.errors import CQError

from .checkpoint import Checkpoint
from .gguf_checkpoint import GgufCheckpoint

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def open_checkpoint(model: str) -> Checkpoint:
    """Open a directory, a GGUF file or a hub id; CQError if it is none of them or not supported."""
    path = Path(model)
    if path.is_file():
        if path.name.lower().endswith((".safetensors", ".json", ".bin")):
            raise CQError(f"{model}: one file of a model: give the directory that holds config.json and the weights")
        return GgufCheckpoint(path)
    if path.is_dir():
        return Checkpoint(path)
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise CQError(f"{model}: no such file or directory")
    return Checkpoint(_download(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises from several libraries; all mean the same to the user
        raise CQError(
            f"{hub_id}: no such directory, and not available from the hub ({type(error).__name__})"
        ) from error

"""Architectures, one file per model_type: adding one is adding arch/<model_type>.py with an ARCHITECTURE in it."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from pyggml_bridge.errors import CQError

from ..architecture import Architecture


def supported() -> list[str]:
    """The model types with a file here."""
    return sorted(module.name for module in iter_modules(__path__))


def find(model_type: str) -> Architecture:
    """The architecture of a checkpoint's model_type; CQError if there is none."""
    if model_type not in supported():
        raise CQError(f"architecture '{model_type}' is not supported (supported: {', '.join(supported())})")
    return import_module(f"{__name__}.{model_type}").ARCHITECTURE

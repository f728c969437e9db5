"""The runner of CodeQuant for GGUF: file -> checked weights -> program -> native kernels -> logits.

`from pyggml_bridge import LLM` is the Python interface: llm.py, described in docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyggml_bridge.errors import CQError
    from pyggml_bridge.llm import LLM

__all__ = ["LLM", "CQError"]


def __getattr__(name: str) -> object:
    """LLM and CQError, imported at their first use: modules of this package are imported without them."""
    if name == "LLM":
        from pyggml_bridge.llm import LLM

        return LLM
    if name == "CQError":
        from pyggml_bridge.errors import CQError

        return CQError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

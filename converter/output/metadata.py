"""GGUF keys of the output: provenance, cq.*, llama.cpp's architecture keys, tokenizer, sampling defaults."""

from __future__ import annotations

from typing import Any

from gguf import GGMLQuantizationType

from pyggml_bridge.format import FILE_TYPES, VERSION
from pyggml_bridge.version import package_version

from ..quantize.plan import Plan
from ..settings import Settings
from ..source.checkpoint import Checkpoint
from ..source.tokenizer import tokenizer_keys

SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def metadata(checkpoint: Checkpoint, settings: Settings, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    """All keys but general.architecture; values are int, float, bool, str or a list of one of them."""
    arch = checkpoint.arch
    keys: dict[str, Any] = {"general.type": "model", "general.name": checkpoint.path.stem}
    if settings.float_type:
        keys["general.file_type"] = int(FILE_TYPES[GGMLQuantizationType[settings.float_type.upper()]])
    keys |= {f"{arch.gguf_name}.{key}": value for key, value in arch.hparams(checkpoint.config).items()}
    keys |= _cq_keys(settings, plan, calibration_tokens)
    return keys | _sampling_keys(checkpoint) | tokenizer_keys(checkpoint)


def _cq_keys(settings: Settings, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "cq.version": VERSION,
        "cq.bits": plan.bits,
        "cq.group_size": settings.grouping.group_size,
        "cq.codebook_rows": settings.grouping.codebook_rows,
        "cq.scale_group": settings.grouping.scale_group,
        "cq.activation_bits": settings.activation_bits,
        "cq.hadamard.ffn_down": plan.hadamard,
        "cq.seed": settings.seed,
        "cq.rotation": settings.rotation,
        "cq.method": settings.method,
        "cq.converter": f"codequant {package_version()}",
    }
    if settings.calibration:
        keys |= {"cq.calibration.file": settings.calibration.name, "cq.calibration.tokens": calibration_tokens}
    return keys


def _sampling_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sampling defaults that the generation config sets, where it asks for sampling at all."""
    config = checkpoint.generation_config
    if not config.do_sample:
        return {}
    found = {name: getattr(config, field, None) for field, name in SAMPLING.items()}
    return {f"general.sampling.{name}": value for name, value in found.items() if value is not None}

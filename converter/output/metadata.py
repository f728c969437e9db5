"""GGUF keys of the output: provenance, cq.*, llama.cpp's architecture keys, tokenizer, sampling defaults."""

from __future__ import annotations

from typing import Any

from pyggml_bridge.format import FILE_TYPES, VERSION, Key
from pyggml_bridge.version import package_version

from ..quantize.plan import Plan
from ..settings import TENSOR_TYPES, Settings
from ..source.checkpoint import Checkpoint
from ..source.tokenizer import tokenizer_keys

SAMPLING = {  # by transformers' names
    "temperature": Key.SAMPLING_TEMP,
    "top_k": Key.SAMPLING_TOP_K,
    "top_p": Key.SAMPLING_TOP_P,
    "min_p": Key.SAMPLING_MIN_P,
}


def metadata(checkpoint: Checkpoint, settings: Settings, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    """All keys but general.architecture; values are int, float, bool, str or a list of one of them."""
    arch = checkpoint.arch
    keys: dict[str, Any] = {Key.GENERAL_TYPE: "model", Key.GENERAL_NAME: checkpoint.name}
    if settings.float_type:
        keys[Key.GENERAL_FILE_TYPE] = int(FILE_TYPES[TENSOR_TYPES[settings.float_type]])
    keys |= {f"{arch.gguf_name}.{key}": value for key, value in arch.hparams(checkpoint.config).items()}
    keys |= _cq_keys(settings, plan, calibration_tokens)
    return keys | _sampling_keys(checkpoint) | tokenizer_keys(checkpoint)


def _cq_keys(settings: Settings, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        Key.CQ_VERSION: VERSION,
        Key.CQ_BITS: plan.bits,
        Key.CQ_GROUP_SIZE: settings.grouping.group_size,
        Key.CQ_CODEBOOK_ROWS: settings.grouping.codebook_rows,
        Key.CQ_SCALE_GROUP: settings.grouping.scale_group,
        Key.CQ_ACTIVATION_BITS: settings.activation_bits,
        Key.CQ_HADAMARD_FFN_DOWN: plan.hadamard,
        Key.CQ_SEED: settings.seed,
        Key.CQ_ROTATION: settings.rotation,
        Key.CQ_METHOD: settings.method,
        Key.CQ_CONVERTER: f"codequant {package_version()}",
    }
    if settings.calibration:
        keys[Key.CQ_CALIBRATION_FILE] = settings.calibration.name
        keys[Key.CQ_CALIBRATION_TOKENS] = calibration_tokens
    return keys


def _sampling_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sampling defaults that the generation config sets, where it asks for sampling at all."""
    config = checkpoint.generation_config
    if not config.do_sample:
        return {}
    values = {key: getattr(config, field, None) for field, key in SAMPLING.items()}
    found: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if found.get(Key.SAMPLING_TOP_K, 0) < 0:  # what some servers call all tokens
        found[Key.SAMPLING_TOP_K] = 0
    return found

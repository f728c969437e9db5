"""GGUF keys of the output: provenance, cq.*, llama.cpp's architecture keys, tokenizer, sampling defaults."""

from __future__ import annotations

from pyggml_bridge.format import FILE_TYPES, VERSION, Key, Keys
from pyggml_bridge.sampling import in_range_or_off
from pyggml_bridge.version import package_version

from ..console import warn
from ..quantize.plan import Plan
from ..settings import TENSOR_TYPES, Settings
from ..source.checkpoint import Checkpoint
from ..source.tokenizer import tokenizer_keys

# transformers' name: the runner's name, the key. The second table counts in greedy decoding too.
DRAWING = {
    "temperature": ("temp", Key.SAMPLING_TEMP),
    "top_k": ("top_k", Key.SAMPLING_TOP_K),
    "top_p": ("top_p", Key.SAMPLING_TOP_P),
    "min_p": ("min_p", Key.SAMPLING_MIN_P),
}
PENALTY = {"repetition_penalty": ("repeat_penalty", Key.SAMPLING_PENALTY_REPEAT)}


def metadata(checkpoint: Checkpoint, settings: Settings, plan: Plan, calibration_tokens: int) -> Keys:
    """All keys but general.architecture; values are int, float, bool, str or a list of one of them."""
    arch = checkpoint.arch
    keys: Keys = {Key.GENERAL_TYPE: "model", Key.GENERAL_NAME: checkpoint.name}
    if settings.float_type:
        keys[Key.GENERAL_FILE_TYPE] = int(FILE_TYPES[TENSOR_TYPES[settings.float_type]])
    keys |= {f"{arch.gguf_name}.{key}": value for key, value in arch.hparams(checkpoint.config).items()}
    keys |= _cq_keys(settings, plan, calibration_tokens)
    return keys | _sampling_keys(checkpoint) | tokenizer_keys(checkpoint)


def _cq_keys(settings: Settings, plan: Plan, calibration_tokens: int) -> Keys:
    keys: Keys = {
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


def _sampling_keys(checkpoint: Checkpoint) -> Keys:
    """Sampling defaults that the generation config sets; those of drawing where it asks for sampling at all.

    Numbers that leave a step out in transformers or its servers become the one that does so in llama.cpp.
    """
    config = checkpoint.generation_config
    found: Keys = {}
    for field, (name, key) in ((DRAWING if config.do_sample else {}) | PENALTY).items():
        value = getattr(config, field, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = in_range_or_off(name, value)
        elif value is not None:
            warn(f"generation_config.json: {field} is {value!r}, which is not a number: left out")
    if Key.SAMPLING_PENALTY_REPEAT in found:
        found[Key.SAMPLING_PENALTY_LAST_N] = -1  # transformers penalizes every token of the context
    return found

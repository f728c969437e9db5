"""Impossible values in config.json and generation_config.json: one line that names the field, whatever the value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from codequant_converter.source.checkpoint import Checkpoint

from pyggml_bridge.errors import CQError

NUMBERS = (0, -1, 10**9, 10**30, 1.5, "96", True, [], {}, float("nan"), float("inf"))
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of a model with other fields in one of its JSON files."""

    def change(name: str, fields: dict[str, object], file: str = "config.json") -> Path:
        model = Path(shutil.copytree(saved(name), tmp_path / "model", dirs_exist_ok=True))
        document = json.loads((saved(name) / file).read_text())
        (model / file).write_text(json.dumps(document | fields))
        return model

    return change


def error_of(model: Path) -> str:
    with pytest.raises(CQError) as error:
        Checkpoint(model)
    return str(error.value)


@pytest.mark.parametrize("field", COUNTS)
def test_dimensions(changed, field):
    for value in NUMBERS:
        assert f"config.json: {field} is " in error_of(changed("qwen3-tied", {field: value})), value


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mixtral", "num_local_experts"),
        ("mixtral", "num_experts_per_tok"),
        ("qwen3_moe", "num_experts"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("deepseek_v2", "n_routed_experts"),
        ("deepseek_v2", "kv_lora_rank"),
        ("deepseek_v2", "qk_rope_head_dim"),
    ],
)
def test_dimensions_of_experts_and_latents(changed, name, field):
    for value in NUMBERS:
        assert f"config.json: {field} is " in error_of(changed(name, {field: value})), value


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_more_experts_per_token_than_there_are(changed, name):
    assert "num_experts_per_tok" in error_of(changed(name, {"num_experts_per_tok": 7}))


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_norms_and_rope(changed, field):
    for value in (-1, float("nan"), float("inf"), 1e39, "1e-5", True, [1e-5], *([0, 1e-60] * (field == "rope_theta"))):
        in_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
        fields = in_rope if field == "rope_theta" else {field: value}
        assert f"{field} is " in error_of(changed("llama-tied", fields)), value
    if field == "rope_theta":
        assert "rope_theta is " in error_of(
            changed("llama-tied", {"rope_theta": float("nan"), "rope_parameters": None})
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
        ({"rope_parameters": ["default"]}, "rope_parameters is ["),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}}, "factor is '2'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": 5, "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "by kind of layer"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "low_freq_factor and high_freq_factor are both 2.0",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": 4}, "rope_scaling is 4"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"attention_bias": 0}, "attention_bias is 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 9999}, "model.layers.3"),
        ({"transformers_weights": 5}, "transformers_weights"),
        ({"transformers_weights": "../m.safetensors"}, "not inside the directory"),
    ],
)
def test_what_else_contradicts_itself(changed, fields, named):
    assert named in error_of(changed("llama-tied", fields))


def test_width_that_heads_do_not_divide(changed):
    assert "hidden_size = 100 is not a multiple" in error_of(changed("mixtral", {"hidden_size": 100}))


@pytest.mark.parametrize("text", ["null", "[]", "5", '"llama"', "", "{", "\ufeff{}", "[" * 100000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_files_that_hold_no_object(changed, file, text):
    model = changed("llama-tied", {})
    (model / file).write_text(text, encoding="utf-8")
    with pytest.raises(CQError, match=rf"{file}: (not a JSON file|holds|begins with a byte order mark)"):
        assert Checkpoint(model).generation_config


def test_files_that_are_not_utf_8(changed):
    model = changed("llama-tied", {})
    (model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "config.json: not a JSON file" in error_of(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.7"),
        ("top_k", [50]),
        ("top_p", {}),
        ("do_sample", "yes"),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, "</s>"]),
        ("bos_token_id", 1.5),
        ("pad_token_id", True),
    ],
)
def test_generation_config(changed, field, value):
    model = changed("llama-tied", {field: value}, "generation_config.json")
    with pytest.raises(CQError, match=rf"generation_config\.json: {field} is "):
        assert Checkpoint(model).generation_config


def test_fields_of_experts_do_not_count_in_a_dense_model(changed):
    fields = {"num_experts_per_tok": 0, "num_local_experts": 0, "moe_intermediate_size": 0, "head_dim": None}
    Checkpoint(changed("llama-tied", fields))

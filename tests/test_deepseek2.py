"""DeepSeek-V2 from checkpoint to logits with default settings: types, cache, threads, export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from codequant_converter.quantize.budget import DISTORTION
from codequant_converter.source import arch
from gguf import GGMLQuantizationType
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

from pyggml_bridge.cuda.kernels import DeviceInfo
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.decoder.rope import rope_table
from pyggml_bridge.errors import CQError
from pyggml_bridge.export import export
from pyggml_bridge.format import type_name
from pyggml_bridge.kv_cache import KVCache
from pyggml_bridge.models import load_model
from pyggml_bridge.models.deepseek2 import build
from pyggml_bridge.operations import Attention
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights
from tests.models import MODELS, TEXT
from tests.test_commands import run, run_json
from tests.test_converter_files import convert
from tests.test_runner import mean_kld

TOKENS = np.arange(130, dtype=np.int32) * 37 % 256


@pytest.fixture(scope="module", params=["deepseek_v2-tied", "deepseek_v2-q-lora-groups"])
def case(request, tmp_path_factory):
    """A file of mixed types with its report: all layers with experts; two dense layers, groups and narrow widths."""
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param].save(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    options = ("--calibration", str(folder / "text.txt"), "--calibration-tokens", "512")
    return folder, request.param, convert(folder / "model", folder / "m.gguf", *options)


def test_default_settings_give_mixed_types_and_a_close_model(case):
    _, name, document = case
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    n_dense = MODELS[name].config().first_k_dense_replace
    for layer in range(3):
        for expansion in ("attn_k_b", "attn_v_b"):  # small, and multiplied in another form than transformers'
            assert tensors[f"blk.{layer}.{expansion}.weight"]["type"] == "q8_0"
        for norm in ("attn_q_a_norm", "attn_kv_a_norm"):
            assert tensors[f"blk.{layer}.{norm}.weight"]["type"] == "f32"
        suffixes = ("",) if layer < n_dense else ("_exps", "_shexp")
        for suffix in suffixes:
            assert set(tensors[f"blk.{layer}.ffn_down{suffix}.weight"]["type"].split("+")) <= set(
                map(type_name, DISTORTION)
            )
        assert (f"blk.{layer}.ffn_gate_inp.weight" in tensors) == (layer >= n_dense)
    assert len({tensor["type"] for tensor in document["tensors"]}) > 3
    assert [entry["layer"] for entry in document["experts"]] == list(range(n_dense, 3))
    assert document["check"]["finite"] and document["check"]["kld"] < 0.02


def test_bit_identical_for_any_team_and_equal_for_any_batches(case):
    folder, _, _ = case
    whole = load_model(folder / "m.gguf", n_threads=1).forward(TOKENS, 0, 100)
    for n_threads in (2, 3, 5):
        assert np.array_equal(whole, load_model(folder / "m.gguf", n_threads=n_threads).forward(TOKENS, 0, 100))
    for n_batch in (1, 7, 64):
        pieces = load_model(folder / "m.gguf", n_threads=2, n_batch=n_batch).forward(TOKENS, 0, 100)
        assert mean_kld(whole, pieces) < 1e-3  # roundings move quantized activations by a step and decide near ties


def test_cache_holds_latents_only(case):
    folder, name, _ = case
    config = MODELS[name].config()
    program = build(Weights(GGUFFile(folder / "m.gguf")), 64)
    assert (program.n_kv_heads, program.head_dim) == (1, config.kv_lora_rank + config.qk_rope_head_dim)
    attentions = [op for op in program.ops if isinstance(op, Attention)]
    assert len(attentions) == 3
    assert all(op.v is None and op.value_dim == config.kv_lora_rank for op in attentions)
    assert KVCache(3, 1, 64, program.head_dim, has_values=False).v is None


def test_commands_run_the_file(case):
    folder, _, _ = case
    file, text = folder / "m.gguf", folder / "text.txt"
    assert run_json("run", file, "-p", "The quick brown", "-n", 8, "--temp", 0, "--json")["generated_tokens"] == 8
    found = run_json("perplexity", file, "-f", text, "-c", 128, "--chunks", 2, "--base", folder / "model", "--json")
    assert found["mean_kld"] < 0.05 and 0 <= found["router_top_k_change"] < 0.2


def test_export_writes_what_llama_cpp_reads(case):
    folder, _, _ = case
    assert run("export", folder / "m.gguf", "--out", folder / "f16.gguf", "--type", "f16").returncode == 0
    reader = gguf.GGUFReader(folder / "f16.gguf")
    stems = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[MODEL_ARCH.DEEPSEEK2]}
    for tensor in reader.tensors:
        stem, _, suffix = tensor.name.rpartition(".")
        parts = ["{bid}" if part.isdigit() else part for part in stem.split(".")]
        assert suffix == "weight" and ".".join(parts) in stems
    assert not any(key.startswith("cq.") for key in reader.fields)
    logits = [load_model(folder / name).forward(TOKENS, 0, 100) for name in ("m.gguf", "f16.gguf")]
    assert mean_kld(*logits) < 2e-3


def test_published_method_with_dense_and_sparse_layers(case, tmp_path):
    """Fine-tuning puts clustered weights and the two fixed row blocks of kv_b_proj into one layer."""
    folder, _, _ = case
    options = ("--calibration", str(folder / "text.txt"), "--calibration-tokens", "1024")
    document = convert(folder / "model", tmp_path / "m.gguf", *options, "--method", "paper", "--bits", "4")
    assert len(document["finetune"]) == 3
    assert document["check"]["kld"] < 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention.key_length": 160}, "not a compressed KV cache"),
        ({"attention.value_length": 64}, "not a compressed KV cache"),
        ({"attention.head_count_kv": 6}, "not a compressed KV cache"),
        ({"attention.key_length_mla": 16}, "not a compressed KV cache"),
        ({"attention.key_length_mla": None}, "attention.key_length_mla is missing"),
        ({"attention.kv_lora_rank": -1}, "attention.kv_lora_rank is -1"),
        ({"attention.value_length_mla": 32}, "attn_v_b.weight has shape"),
        ({"attention.q_lora_rank": 32}, "attn_q_a.weight has shape"),
        ({"attention.q_lora_rank": 0}, "attn_q.weight is missing"),
        ({"expert_gating_func": 2}, "softmax"),
        ({"expert_group_count": 4, "expert_group_used_count": 2}, "impossible"),
        ({"expert_group_count": 5, "expert_group_used_count": 1}, "impossible"),
        ({"leading_dense_block_count": 1}, "ffn_gate.weight is missing"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.factor is missing"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0, "rope.scaling.original_context_length": 4},
            "yarn",
        ),
        ({"rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_contradictions_are_named(tied, changes, named):
    file = GGUFFile(tied)
    for key, value in changes.items():
        file.metadata.pop(f"deepseek2.{key}", None)
        if value is not None:
            file.metadata[f"deepseek2.{key}"] = value
    with pytest.raises(CQError, match=named):
        build(Weights(file), 64)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    MODELS["deepseek_v2-tied"].save(folder / "model")
    convert(folder / "model", folder / "m.gguf", "--tensor-type", "attn_[kv]_b=cq4")
    return folder / "m.gguf"


def test_cuda_plans_the_program(tied):
    program = build(Weights(GGUFFile(tied)), 64)
    planned = CUDAProgram(program, 8, DeviceInfo(100))
    kernels = [launch.kernel for segment in range(len(planned.segments)) for launch in planned.launches(segment, 1, 1)]
    assert kernels.count("latent_attention") == kernels.count("append") == 3


def test_expansions_can_be_clustered(tied, tmp_path):
    """Each head's queries and latents are then quantized by themselves."""
    types = {name: tensor.type.name for name, tensor in GGUFFile(tied).tensors.items()}
    assert types["blk.0.attn_k_b.weight"] == types["blk.0.attn_v_b.weight"] == "CQ4"
    export(tied, tmp_path / "f32.gguf", GGMLQuantizationType.F32)
    logits = [load_model(path).forward(TOKENS, 0, 100) for path in (tied, tmp_path / "f32.gguf")]
    assert mean_kld(*logits) < 2e-3


@pytest.fixture
def lite(tmp_path) -> Any:
    """DeepSeek-V2-Lite's published config.json, in its old form: greedy choice, yarn with equal mscales."""
    config = {"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944}
    config |= {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2}
    config |= {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "kv_lora_rank": 512}
    config |= {"q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 1}
    config |= {"topk_method": "greedy", "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1}
    config |= {"norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6}
    config |= {"aux_loss_alpha": 0.001, "seq_aux": True, "max_position_embeddings": 163840, "rope_theta": 10000}
    scaling = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
    config["rope_scaling"] = scaling | {"original_max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(tmp_path)


def test_configuration_of_deepseek_v2_lite(lite):
    described = arch.find("deepseek_v2")
    described.check(lite)
    keys = described.hparams(lite)
    assert (keys["attention.key_length"], keys["attention.value_length"]) == (576, 512)
    assert (keys["attention.key_length_mla"], keys["attention.value_length_mla"]) == (192, 128)
    assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert "rope.scaling.attn_factor" not in keys  # so llama.cpp's formula is the same
    assert keys["attention.q_lora_rank"] == 0 and "expert_group_count" not in keys
    stems = [{linear.name for linear in described.at(lite, layer).linears} for layer in (0, 1, 26)]
    assert "ffn_down" in stems[0] and stems[1] == stems[2] and {"attn_q", "ffn_down_shexp"} <= stems[1]


def test_rope_is_transformers_yarn_far_into_the_context(tied, lite):
    file = GGUFFile(tied)
    file.metadata |= {f"deepseek2.{key}": value for key, value in arch.find("deepseek_v2").hparams(lite).items()}
    table = rope_table(Weights(file), "deepseek2", 16384, lite.qk_rope_head_dim, yarn=True)
    want = DeepseekV2RotaryEmbedding(lite)(torch.zeros(1), torch.arange(16384)[None])[0]
    # three roundings of an inverse frequency, one of the angle: each up to 16384 * 2^-24
    np.testing.assert_allclose(table, torch.view_as_real(want).numpy(), atol=4 * 16384 * 2.0**-24)

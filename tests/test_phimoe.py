"""Phi-MoE: LayerNorms as RMS norms, longrope across its threshold, a whole conversion, and what is refused."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from codequant_converter.source.arch import phimoe
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.fold import fold_norms
from gguf import GGMLQuantizationType
from transformers import AutoConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from pyggml_bridge.cuda.kernels import DeviceInfo
from pyggml_bridge.cuda.program import CUDAProgram
from pyggml_bridge.errors import CQError
from pyggml_bridge.export import export
from pyggml_bridge.models import load_model
from pyggml_bridge.models.phimoe import build
from pyggml_bridge.native import available_isas, choose_isa
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.weights import Weights
from tests.models import LONGROPE, MODELS, TEXT, VOCAB
from tests.test_converter_files import convert

TOKENS = np.arange(64, dtype=np.int32) * 37 % VOCAB
WIDE, LONG = "phimoe-window-wide-heads", "phimoe-longrope-long"
ORIGINAL = LONGROPE["original_max_position_embeddings"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder with WIDE converted by default settings as wide.gguf, and LONG in F32 as long.gguf; WIDE's report."""
    folder = tmp_path_factory.mktemp("phimoe")
    for name in (WIDE, LONG):
        MODELS[name].save(folder / name)
    (folder / "text.txt").write_text(TEXT)
    options = ("--calibration", str(folder / "text.txt"), "--calibration-tokens", "1024")
    report = convert(folder / WIDE, folder / "wide.gguf", *options)
    convert(folder / LONG, folder / "long.gguf", "--tensor-type", ".=f32", "--no-check")
    return folder, report


def test_scales_of_zero_lose_no_bias(tmp_path):
    """W (s n + b) of every reader, where b / s would not exist; the folded norm adds one constant to all channels."""
    MODELS["phimoe"].save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    layer = checkpoint.layer(0) | checkpoint.expert(0, 1)
    for name in ("attn_norm", "ffn_norm"):
        layer[f"{name}.bias"] = torch.linspace(-1, 2, 96)
    layer["attn_norm"][::2] = 0
    layer["ffn_norm"][:] = 0
    folded = fold_norms(checkpoint.arch, layer)
    normed = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    normed -= normed.mean(dim=-1, keepdim=True)
    for linear in checkpoint.arch.linears:
        if linear.norm:
            bias = layer[linear.bias] if linear.bias else 0
            want = (normed * layer[linear.norm] + layer[f"{linear.norm}.bias"]) @ layer[linear.name].mT + bias
            found = (normed + folded[f"{linear.norm}.bias"]) @ folded[linear.name].mT
            torch.testing.assert_close(found + (folded[linear.bias] if linear.bias else 0), want, rtol=1e-4, atol=1e-4)
    assert (folded["ffn_norm.bias"] == folded["ffn_norm.bias"][0]).all() and folded["ffn_norm.bias"][0] > 0


def test_nothing_writes_a_mean(tmp_path):
    MODELS["phimoe"].save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    folded = fold_norms(checkpoint.arch, checkpoint.layer(1) | checkpoint.expert(1, 0))
    for mean in (folded["attn_output"].mean(0), folded["attn_output.bias"].mean(), folded["ffn_down_exps"].mean(0)):
        assert mean.abs().max() < 1e-6


@pytest.mark.parametrize("n_tokens", [ORIGINAL, ORIGINAL + 1])
def test_rope_factors_follow_the_length(converted, n_tokens):
    """The runner's table and transformers' corrected embedding, against the published formula."""
    folder, _ = converted
    which = "short" if n_tokens <= ORIGINAL else "long"
    exponents = np.arange(0, 16, 2) / 16
    angles = np.arange(n_tokens)[:, None] / (np.array(LONGROPE[f"{which}_factor"]) * 10000.0**exponents)
    want = np.stack([np.cos(angles), np.sin(angles)], -1) * LONGROPE[f"{which}_mscale"]
    rotary = PhimoeRotaryEmbedding(MODELS[LONG].config())
    phimoe.correct_rope(rotary)
    theirs = rotary(torch.zeros(1), torch.arange(n_tokens)[None])
    np.testing.assert_allclose(torch.stack(theirs, -1)[0, :, :8].numpy(), want, atol=1e-5)
    model = load_model(folder / "long.gguf", n_ctx=64, n_threads=1)
    model.forward(TOKENS[:n_tokens], 0, 1)
    np.testing.assert_allclose(model._long_rope.table[:n_tokens], want, atol=1e-5)


def test_decoding_across_the_original_length_is_prefilling(converted):
    """Where the factors change, what the cache holds is computed anew; and back again in a shorter sequence."""
    folder, _ = converted
    model = load_model(folder / "long.gguf", n_ctx=64, n_threads=1, n_batch=10)
    step = model.forward(TOKENS[:20], 0, 1)
    for end in range(21, 40):
        step = model.forward(TOKENS[end - 1 : end], end - 1, 1)
        fresh = load_model(folder / "long.gguf", n_ctx=64, n_threads=1).forward(TOKENS[:end], 0, 1)
        np.testing.assert_allclose(step, fresh, rtol=1e-4, atol=1e-4)
    shorter = model.forward(TOKENS[15:17], 15, 1)
    fresh = load_model(folder / "long.gguf", n_ctx=17, n_threads=1).forward(TOKENS[:17], 0, 1)
    np.testing.assert_allclose(shorter, fresh, rtol=1e-4, atol=1e-4)


def test_default_settings_mix_types_and_the_file_runs(converted):
    folder, report = converted
    types = {tensor["name"]: tensor["type"] for tensor in report["tensors"]}
    for layer in range(3):
        for name in ("ffn_gate_inp.weight", "attn_norm.bias", "ffn_norm.bias", "attn_q.bias", "attn_output.bias"):
            assert types[f"blk.{layer}.{name}"] == "f32"
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] != "f32"
    assert {"output.bias", "output_norm.bias"} <= set(types) and types["output.weight"] == "cq5"
    assert report["bpw"] <= 4.8 and report["check"]["kld"] < 0.1
    whole = load_model(folder / "wide.gguf", n_threads=1).forward(TOKENS, 0, 64).copy()
    for n_threads in (2, 3, 5):
        np.testing.assert_array_equal(
            load_model(folder / "wide.gguf", n_threads=n_threads).forward(TOKENS, 0, 64), whole
        )


def test_every_instruction_set_chooses_alike(converted):
    folder, _ = converted
    found = []
    try:
        for isa in available_isas():
            choose_isa(isa)
            model = load_model(folder / "long.gguf", n_ctx=64, n_threads=2)
            found.append(model.forward(TOKENS, 0, 64).copy())
    finally:
        choose_isa(None)
    for logits in found[1:]:
        np.testing.assert_allclose(logits, found[0], rtol=1e-3, atol=1e-3)


def test_export_has_llama_cpps_names(converted):
    """All that its loader asks for, and nothing else."""
    folder, _ = converted
    export(folder / "long.gguf", folder / "long-f16.gguf", GGMLQuantizationType.F16)
    reader = gguf.GGUFReader(folder / "long-f16.gguf")
    blocks = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"]
    names = {f"blk.{i}.{name}.{part}" for i in range(3) for name in blocks for part in ("weight", "bias")}
    experts = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    names |= {f"blk.{i}.{name}.weight" for i in range(3) for name in experts}
    names |= {f"{name}.{part}" for name in ("output", "output_norm") for part in ("weight", "bias")}
    names |= {"token_embd.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    assert {tensor.name for tensor in reader.tensors} == names
    assert reader.get_field("phimoe.rope.scaling.original_context_length").contents() == ORIGINAL
    assert reader.get_field("phimoe.rope.scaling.attn_factor").contents() == pytest.approx(LONGROPE["short_mscale"])
    ours = load_model(folder / "long-f16.gguf", n_ctx=64, n_threads=2).forward(TOKENS, 0, 64)
    assert np.isfinite(ours).all()


def test_published_configuration_is_described(tmp_path):
    """The fields of Phi-3.5-MoE's config.json, rope by its older name."""
    rope = {key: value for key, value in LONGROPE.items() if key not in ("rope_type", "rope_theta")}
    rope |= {
        "type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 4096,
    }
    document = {"model_type": "phimoe", "rope_scaling": rope, "rope_theta": 10000.0, "sliding_window": 131072}
    document |= {"attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(tmp_path)
    phimoe.check(config)
    keys = phimoe.hparams(config)
    assert keys["rope.scaling.original_context_length"] == 4096 and keys["attention.sliding_window"] == 131072
    assert keys["expert_count"] == 16 and keys["router_jitter_noise"] == 0.01


def test_missing_biases_are_named(tmp_path):
    """Only what the configuration leaves out is zero."""
    MODELS["phimoe-tied-no-biases"].save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, name in (("attention_bias", "self_attn.q_proj.bias"), ("lm_head_bias", "lm_head.bias")):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: True}))
        with pytest.raises(CQError, match=name):
            open_checkpoint(str(tmp_path))


def test_cuda_plans_the_program(converted):
    """One buffer of angles, which is filled anew when the factors change."""
    folder, _ = converted
    program = build(Weights(GGUFFile(folder / "long.gguf")), 64)
    planned = CUDAProgram(program, 8, DeviceInfo(1))
    kernels = [launch.kernel for segment in range(len(planned.segments)) for launch in planned.launches(segment, 1, 1)]
    assert kernels.count("route") == kernels.count("prepare_heads") == program.n_layers
    assert program.long_rope and planned.memory.holding(program.long_rope.table) is not None


def test_files_that_do_not_fit_are_refused(converted, tmp_path):
    folder, _ = converted
    file = GGUFFile(folder / "long.gguf")
    del file.tensors["blk.1.ffn_norm.bias"]
    with pytest.raises(CQError, match=r"blk\.1\.ffn_norm\.bias is missing"):
        build(Weights(file), 64)
    for key, value, fragment in (
        ("phimoe.router_jitter_noise", None, "router_jitter_noise is missing"),
        ("phimoe.router_jitter_noise", -1.0, "router_jitter_noise is -1.0"),
        ("phimoe.attention.sliding_window", -1, "sliding_window -1"),
        ("phimoe.rope.scaling.original_context_length", 0, "0 tokens"),
    ):
        file = GGUFFile(folder / "long.gguf")
        file.metadata[key] = value
        if value is None:
            del file.metadata[key]
        with pytest.raises(CQError, match=fragment):
            build(Weights(file), 64)

"""Folding, rotating and permuting leave the float model's logits unchanged, per architecture and feature."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.source import arch
from codequant_converter.source.architecture import value_dim_of
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.fold import fold_norms
from codequant_converter.transform.rotation import random_rotation
from codequant_converter.transform.transformed_model import TransformedModel
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from pyggml_bridge import models
from pyggml_bridge.errors import CQError
from pyggml_bridge.models import architectures
from tests.models import DEEPSEEK_V2, LONGROPE, MODELS, VOCAB, YARN, TinyModel

TOLERANCE = 1e-3  # of the logit range
TOKENS = torch.arange(60).mul(37).remainder(VOCAB)[None]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = MODELS[request.param].save(folder)
    with torch.no_grad():
        return open_checkpoint(str(folder)), model(input_ids=TOKENS).logits[0]


@torch.no_grad()
def streamed_logits(model: TransformedModel) -> torch.Tensor:
    stream = LayerStream(model.checkpoint)
    hidden = model.embedding()[TOKENS]
    for i in range(model.checkpoint.config.num_hidden_layers):
        stream.forward(stream.load(model, i), hidden)
    return model.logits(stream.final_norm(hidden))[0]


def assert_same(logits: torch.Tensor, original: torch.Tensor) -> None:
    assert (logits - original).abs().max() <= TOLERANCE * (original.max() - original.min())


def test_fold_keeps_logits(case):
    checkpoint, original = case
    layer = checkpoint.arch_of(0)
    folded = fold_norms(layer, checkpoint.layer(0))
    assert all((folded[norm.name] == 1).all() for norm in layer.norms)
    assert_same(streamed_logits(TransformedModel(checkpoint)), original)


def test_rotation_keeps_logits(case):
    checkpoint, original = case
    rotation = random_rotation(checkpoint.config.hidden_size, seed=3)
    assert_same(streamed_logits(TransformedModel(checkpoint, rotation)), original)


def test_rotated_heads_keep_logits(case):
    checkpoint, original = case
    rotated = TransformedModel(checkpoint, None, random_rotation(value_dim_of(checkpoint.config), seed=5))
    before, after = TransformedModel(checkpoint).layer(1), rotated.layer(1)
    for name in (checkpoint.arch.heads.value, checkpoint.arch.heads.output):
        assert not torch.allclose(before[name], after[name])
    assert_same(streamed_logits(rotated), original)


def test_permutation_keeps_logits(case):
    """Blocks of 8 columns: small enough that FFN channels and every head's value channels really move."""
    checkpoint, original = case
    permuted = TransformedModel(checkpoint, permute_block=8)
    before, after = TransformedModel(checkpoint).whole_layer(1), permuted.whole_layer(1)
    layer = checkpoint.arch_of(1)
    for name in (*(group.consumer for group in layer.channels), layer.heads.output):
        assert not torch.equal(before[name], after[name])
    assert_same(streamed_logits(permuted), original)


def test_all_stages_keep_logits(case):
    checkpoint, original = case
    rotation = random_rotation(checkpoint.config.hidden_size, seed=4)
    head_rotation = random_rotation(value_dim_of(checkpoint.config), seed=5)
    assert_same(streamed_logits(TransformedModel(checkpoint, rotation, head_rotation, permute_block=16)), original)


@pytest.mark.parametrize("name", MODELS)
def test_tensor_names_are_those_of_llama_cpp(name):
    """gguf-py lists the tensors that llama.cpp reads for each of its architectures."""
    described = arch.find(MODELS[name].model_type)
    (known,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == described.gguf_name]
    names = {TENSOR_NAMES[tensor].format(bid=0) for tensor in MODEL_TENSORS[known]}
    for layer in (0, 2):
        specs = described.at(MODELS[name].config(), layer).specs
        assert specs
        for spec in specs:
            assert spec.in_file(0).rpartition(".")[0] in names


def test_files_of_architectures_do_not_import_each_other():
    """What they share is in converter/source/blocks.py and pyggml_bridge/decoder/builder.py."""
    for name in arch.supported():
        text = (Path(arch.__file__).parent / f"{name}.py").read_text()
        assert not re.search(r"^from \.(?!\.)", text, re.MULTILINE), name
    for name in architectures():
        text = (Path(models.__file__).parent / f"{name}.py").read_text()
        assert "from pyggml_bridge.models import" not in text, name
        assert not set(re.findall(r"^from pyggml_bridge\.models\.(\w+)", text, re.MULTILINE)) & {*architectures()}, name


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("mistral", {"sliding_window": 64}, "sliding_window = 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window = 64"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias = False"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True"),
        ("deepseek_v2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts = 0"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok = None"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}, "n_group = 4"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": None}, "topk_group = None"),
        ("deepseek_v2", {"rope_parameters": YARN | {"truncate": False}}, "truncate = False"),
        ("deepseek_v2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok = 4"),
        ("phimoe", {"num_local_experts": 1}, "num_local_experts = 1"),
        ("phimoe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("phimoe", {"sliding_window": 0}, "sliding_window = 0"),
        ("phimoe", {"rope_parameters": LONGROPE | {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ("phimoe", {"rope_parameters": LONGROPE | {"long_factor": [1.0] * 7 + [0.0]}}, "long_factor = [1.0"),
        ("phimoe", {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 5}}, "short_factor = [1.0"),
    ],
)
def test_features_that_are_not_described_are_named(model_type, fields, named):
    common = {"qwen3_moe": {"norm_topk_prob": True}, "deepseek_v2": DEEPSEEK_V2}.get(model_type, {})
    config = TinyModel(model_type, common | fields).config()
    with pytest.raises(CQError, match=re.escape(named)):
        arch.find(model_type).check(config)


def test_missing_inverse_would_be_noticed(case):
    """The tolerance is tight enough to fail on a rotation that is not orthogonal."""
    checkpoint, original = case
    rotation = random_rotation(checkpoint.config.hidden_size, seed=3)
    rotation[0] *= 1.05
    logits = streamed_logits(TransformedModel(checkpoint, rotation))
    assert (logits - original).abs().max() > TOLERANCE * (original.max() - original.min())

"""The stages of the converter one by one: rotation, permutation, Hessians, tokenizer metadata."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codequant_converter.calibrate.capture import capture
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.calibrate.streamed_experts import Expert
from codequant_converter.calibrate.tokens import read_tokens
from codequant_converter.source.architecture import interleave_rope, split_rope
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.source.tokenizer import tokenizer_keys
from codequant_converter.transform.permutation import outlier_order
from codequant_converter.transform.rotation import (
    cayley,
    learn_rotation,
    orthogonalize,
    quantization_loss,
    random_rotation,
)
from codequant_converter.transform.transformed_model import TransformedModel
from codequant_converter.transform.weight_layout import WeightLayout

from pyggml_bridge.format import hadamard, quantize_activations
from pyggml_bridge.tokenizer import Tokenizer
from tests.models import MODELS, TEXT


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MODELS["mixtral"].save(folder)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 96, 576])
def test_random_rotation_is_orthogonal_and_spreads(n):
    rotation = random_rotation(n, seed=1).double()
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)
    power_of_two = n & -n
    assert rotation.abs().max() <= power_of_two**-0.5 + 1e-6
    assert n == 1 or not torch.equal(rotation, random_rotation(n, seed=2).double())


def test_cayley_is_orthogonal():
    m = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(cayley(m).T @ cayley(m), torch.eye(48, dtype=torch.float64))
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_loss_is_that_of_the_run_time_quantizer(bits):
    x = np.random.default_rng(2).standard_normal((50, 96)).astype(np.float32)
    q, scales = quantize_activations(x, bits)
    expected = np.mean((x - q * scales[:, None]) ** 2)
    assert float(quantization_loss(torch.from_numpy(x), bits)) == pytest.approx(expected, rel=1e-4)


def test_learning_lowers_the_loss_on_rows_it_has_not_seen():
    """Rows with a fixed outlier direction, which a random rotation spreads and a learned one spreads evenly."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(32, generator=generator)
    rows = torch.randn(6, 800, 32, generator=generator) + 20 * torch.randn(6, 800, 1, generator=generator) * direction
    start = random_rotation(32, seed=0)
    learned = learn_rotation(rows[:, :400], start, bits=4, seed=0)
    assert learned.loss_end < 0.9 * learned.loss_start
    before, after = (float(quantization_loss(rows[:, 400:] @ r, 4)) for r in (start, learned.rotation))
    assert after < 0.9 * before
    torch.testing.assert_close(learned.rotation @ learned.rotation.T, torch.eye(32), atol=1e-5, rtol=0)


def test_orthogonalize_changes_an_orthogonal_matrix_by_rounding_only():
    rotation = random_rotation(96, seed=5)
    torch.testing.assert_close(orthogonalize(rotation * 1.0001), rotation, atol=1e-5, rtol=0)


def test_outlier_order_deals_one_high_variance_group_into_each_block():
    """64 columns, 16 of them wild: as many as there are columns in one sub-group per block of 16."""
    generator = torch.Generator().manual_seed(6)
    columns = torch.randn(200, 64, generator=generator) * 0.1
    wild = torch.randperm(64, generator=generator)[:16]
    columns[:, wild] *= 50
    order = outlier_order(columns, block=16)
    assert sorted(order.tolist()) == list(range(64))
    per_block = [sum(int(c) in wild.tolist() for c in block) for block in order.split(16)]
    assert per_block == [4, 4, 4, 4]
    assert torch.equal(outlier_order(columns, block=64), torch.arange(64))


@pytest.mark.parametrize("n", [60, 65, 100])
def test_outlier_order_is_a_permutation_for_any_width(n):
    columns = torch.randn(10, n, generator=torch.Generator().manual_seed(n))
    assert sorted(outlier_order(columns, block=32).tolist()) == list(range(n))


def test_rope_order_is_llama_cpps():
    rows = torch.arange(2 * 6).reshape(12, 1).float()
    assert interleave_rope(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(split_rope(interleave_rope(rows, 2), 2), rows)


def test_hessians_are_those_of_every_linears_input(mixtral):
    """Against inputs recomputed from the layer's definition, expert by expert."""
    stream, model = LayerStream(mixtral), TransformedModel(mixtral)
    module, layer = stream.load(model, 0), model.whole_layer(0)
    hidden = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(1))
    seen = {}
    module.post_attention_layernorm.register_forward_hook(lambda m, i, out: seen.update(x=out.flatten(0, 1)))
    with capture(mixtral.arch, module) as hessians:
        routed = stream.without_experts(module, hidden)
    x = seen["x"]
    chosen = (x @ layer["ffn_gate_inp"].T).topk(2, dim=-1).indices
    for expert in range(4):
        rows = x[(chosen == expert).any(dim=-1)]
        inner = torch.nn.functional.silu(rows @ layer["ffn_gate_exps"][expert].T) * (
            rows @ layer["ffn_up_exps"][expert].T
        )
        found = routed.hessians(expert, Expert.of(mixtral.arch, model.expert(0, expert), stream.activation(0)), None)
        for entry, inputs in zip(found, (rows, inner), strict=True):
            assert entry.tokens == len(rows)
            expected = inputs.T @ inputs / len(rows)
            torch.testing.assert_close(entry.matrix, expected, rtol=1e-3, atol=1e-5)
            damping = (0.1 + 0.4 * max(0, len(expected) / len(rows) - 0.25)) * expected.diagonal().mean()
            torch.testing.assert_close(
                entry.damped, expected + damping * torch.eye(len(expected)), rtol=1e-3, atol=1e-5
            )
    assert sum(len(routed.rows(expert)[0]) for expert in range(4)) == 2 * 60
    assert hessians["self_attn.q_proj"].tokens == 60
    cholesky = hessians["self_attn.o_proj"].cholesky
    assert torch.equal(cholesky, cholesky.triu())
    torch.testing.assert_close(cholesky @ cholesky.T, hessians["self_attn.o_proj"].damped, rtol=1e-4, atol=1e-4)


def test_calibration_tokens_are_the_texts(mixtral, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    tokens = read_tokens(mixtral, file, 1000)
    assert tokens.shape == (1, 512)
    assert mixtral.tokenizer.decode(tokens[0]) == TEXT[: len(mixtral.tokenizer.decode(tokens[0]))]


def test_runner_tokenizes_like_transformers_by_either_description(mixtral):
    keys = tokenizer_keys(mixtral)
    expected = mixtral.tokenizer.encode(TEXT)
    assert 259 in expected or 260 in expected  # the merges are used
    described = {key: value for key, value in keys.items() if key != "tokenizer.huggingface.json"}
    for description in (keys, described):
        tokenizer = Tokenizer.from_metadata(description)
        assert tokenizer.encode(TEXT, add_special=False).tolist() == expected
        assert tokenizer.eos_ids == {257, 258}
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.eot_token_id"] == 258
    assert keys["cq.eos_token_ids"] == [257, 258]
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert len(keys["tokenizer.ggml.tokens"]) == mixtral.config.vocab_size


def test_weight_layout_goes_there_and_back_and_keeps_outputs():
    rng = np.random.default_rng(15)
    weight = torch.from_numpy(rng.standard_normal((48, 128)).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal((200, 128)).astype(np.float32))
    layout = WeightLayout(rope_heads=3, hadamard=64)
    stored = layout.to_file(weight)
    assert not torch.allclose(stored, weight)
    torch.testing.assert_close(layout.from_file(stored), weight)
    inputs = torch.from_numpy(hadamard(x.numpy(), 64))
    torch.testing.assert_close(inputs @ stored.T, x @ interleave_rope(weight, 3).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layout.input_hessian(x.T @ x), inputs.T @ inputs, rtol=1e-4, atol=1e-3)

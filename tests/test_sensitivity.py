"""The backward pass against autograd on the whole model, and feedback from row to row against its objective."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from codequant_converter.calibrate import fisher
from codequant_converter.calibrate.hessian import Hessian
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.quantize.clustering import (
    Fit,
    OutputErrors,
    descend_noting,
    error_feedback,
    fit_codebooks,
    new_fit,
    weights_of,
)
from codequant_converter.quantize.row_feedback import ROWS, cluster_in_turn, sweep
from codequant_converter.resume.work_folder import WorkFolder
from codequant_converter.settings import Grouping
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.transformed_model import TransformedModel
from codequant_converter.transform.weight_layout import WeightLayout

from pyggml_bridge.format import CQType

from .models import TinyModel

MODELS = [
    TinyModel("llama"),
    TinyModel("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


def drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Targets drawn from the softmax of logits [tokens, n], as the sensitivity draws them."""
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    at = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at)[:, 0]


@pytest.mark.parametrize("router_weight", [0.0, 0.25])
@pytest.mark.parametrize("tiny", MODELS, ids=lambda m: m.model_type)
def test_gradients_are_those_of_the_whole_model(tmp_path, tiny, router_weight):
    """With a linear's gradients by autograd on transformers' own model, in the folded layout."""
    model = tiny.save(tmp_path / "m")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    tokens = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(5))
    (tmp_path / "s").mkdir()
    transformed, work = TransformedModel(checkpoint), WorkFolder(tmp_path / "s")
    found = fisher.measure(transformed, LayerStream(checkpoint), tokens, work, 3, router_weight)
    assert not list((tmp_path / "s").glob("hidden*"))

    gradients: dict[str, torch.Tensor] = {}
    arguments: tuple[torch.Tensor, ...] = ()

    def watch(module: torch.nn.Module, name: str) -> None:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal arguments
            arguments = inputs
            output.register_hook(lambda g: gradients.update({name: g.flatten(0, -2).clone()}))

        module.register_forward_hook(hook)

    routers: list[torch.Tensor] = []
    for any_layer in model.get_decoder().layers:
        if tiny.model_type == "mixtral":
            any_layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routers.append(output[0]))
    layer = model.get_decoder().layers[1]
    watch(layer.self_attn.v_proj, "attn_v")
    watch(layer.mlp.experts if tiny.model_type == "mixtral" else layer.mlp.down_proj, "ffn")
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(3)
    loss = torch.nn.functional.cross_entropy(logits, drawn(logits, generator), reduction="sum")
    for router in reversed(routers if router_weight else []):
        choice = torch.nn.functional.cross_entropy(router, drawn(router, generator), reduction="sum")
        loss = loss + router_weight**0.5 * choice
    loss.backward()
    layer1 = found.layer(1)

    g = gradients["attn_v"]
    expected = g.T @ (g / g.norm(dim=-1, keepdim=True))
    got = layer1.outputs["attn_v"][0].hessian().matrix
    torch.testing.assert_close(got, expected / expected.diagonal().mean(), rtol=5e-3, atol=5e-3)
    by_out = gradients["ffn"]
    if tiny.model_type == "llama":
        norms = by_out.norm(dim=-1)
        torch.testing.assert_close(layer1.token_weights["mlp.down_proj"], norms / norms.mean(), rtol=1e-2, atol=1e-3)
        return
    norms = by_out.norm(dim=-1)
    torch.testing.assert_close(layer1.token_weights["mlp.experts"], norms / norms.mean(), rtol=1e-2, atol=1e-3)
    states, index, routing = arguments
    states = states.flatten(0, -2)
    for expert in range(4):
        token, slot = torch.where(index == expert)
        x = states[token]
        gate_up = (x @ layer.mlp.experts.gate_up_proj[expert].T).detach().requires_grad_()
        gate, up = gate_up.chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ layer.mlp.experts.down_proj[expert].T * routing[token, slot, None]
        (by_gate_up,) = torch.autograd.grad(y, gate_up, by_out[token])
        for name, g in zip(("ffn_gate_exps", "ffn_up_exps"), by_gate_up.chunk(2, dim=-1), strict=True):
            expected = g.T @ (g / g.norm(dim=-1, keepdim=True))
            entry = layer1.outputs[name][expert]
            assert entry.tokens == len(token)
            torch.testing.assert_close(
                entry.hessian().matrix, expected / expected.diagonal().mean(), rtol=5e-3, atol=5e-3
            )
    assert len(layer1.outputs["ffn_down_exps"]) == 1
    assert layer1.outputs["ffn_down_exps"][0].tokens == 2 * tokens.numel()


def test_predicted_kl_is_that_of_random_errors(tmp_path, monkeypatch):
    """Half the mean square of g^T E x over errors E of the weights; without feedback, so that nothing is gained."""
    monkeypatch.setattr(Hessian, "feedback_gain", 1.0)
    model = MODELS[0].save(tmp_path / "m")
    tokens = torch.randint(0, 250, (4, 40), generator=torch.Generator().manual_seed(5))
    (tmp_path / "s").mkdir()
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    transformed = TransformedModel(checkpoint)
    found = fisher.measure(transformed, LayerStream(checkpoint), tokens, WorkFolder(tmp_path / "s"), 3, 0.0)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda g: pairs.append((x, g.flatten(0, -2).clone())))

    model.get_decoder().layers[2].mlp.down_proj.register_forward_hook(hook)
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    targets = drawn(logits, torch.Generator().manual_seed(3))
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    (x, g), weight = pairs[0], transformed.layer(2)["ffn_down"]
    errors = torch.randn(400, *weight.shape, generator=torch.Generator().manual_seed(7))
    errors *= weight.square().mean(dim=1, keepdim=True).sqrt()
    predicted_kl = 0.5 * torch.stack([((g @ error) * x).sum(dim=-1).square().mean() for error in errors]).mean()
    assert found.predicted_kl[2]["ffn_down"] == [pytest.approx(float(predicted_kl), rel=0.1)]


def test_drawn_tokens_follow_the_models_distribution():
    """The gradient by the logits is p - onehot(y): its mean over many draws vanishes, so that by hidden does."""
    head = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(1, 20000, 16).contiguous()

    class Norm:
        def final_norm(self, x: torch.Tensor) -> torch.Tensor:
            return x

    gradient = fisher._head_gradient(Norm(), hidden, head, torch.Generator().manual_seed(0))[0]
    assert float(gradient.mean(dim=0).norm()) < 0.03 * float(gradient.norm(dim=-1).mean())


def weighted_loss(outputs: np.ndarray, inputs: np.ndarray, error: np.ndarray) -> float:
    return float(((outputs @ error) * (error @ inputs)).sum())


@pytest.mark.parametrize("rows", [40, 96])
def test_feedback_from_row_to_row_lowers_the_loss_it_is_for(rows):
    """Under correlated outputs; every element of the file's types takes part, the last block being a short one."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, 128)).astype(np.float32)
    x = rng.standard_normal((400, 128)) @ rng.standard_normal((128, 128))
    g = rng.standard_normal((400, 6)) @ rng.standard_normal((6, rows)) + 0.3 * rng.standard_normal((400, rows))
    inputs, outputs = Hessian(128), Hessian(rows)
    inputs.add(torch.from_numpy(x).float())
    outputs.add(torch.from_numpy(g).float())
    h, o = inputs.damped.numpy().astype(np.float64), outputs.damped.numpy().astype(np.float64)

    def cluster(fit: Fit) -> None:
        fit_codebooks(fit, 2)
        error_feedback(fit, inputs.cholesky.numpy(), 2)

    plain, in_turn = (new_fit(w, np.diag(h).astype(np.float32), CQType.CQ3, Grouping()) for _ in range(2))
    cluster(plain)
    cluster_in_turn(in_turn, outputs.cholesky, cluster, 2)
    losses = [weighted_loss(o, h, weights_of(fit, 2).astype(np.float64) - w) for fit in (plain, in_turn)]
    assert losses[1] < 0.9 * losses[0]
    begin = ROWS  # the second block's targets are the minimum over real-valued rows, the first one's errors given
    error = weights_of(in_turn, 2)[:begin] - w[:begin]
    best = w[begin:] - np.linalg.solve(o[begin:, begin:], o[begin:, :begin] @ error)
    end = 2 * ROWS
    np.testing.assert_allclose(in_turn.w[begin:end], best[: end - begin], rtol=1e-3, atol=1e-3)


def test_sweeps_over_the_rows_never_raise_the_loss():
    """A callback that makes some blocks worse is undone where it did."""
    rng = np.random.default_rng(2)
    w = rng.standard_normal((40, 128)).astype(np.float32)
    inputs, outputs = Hessian(128), Hessian(40)
    inputs.add(torch.from_numpy(rng.standard_normal((300, 128)) @ rng.standard_normal((128, 128))).float())
    outputs.add(torch.from_numpy(rng.standard_normal((300, 5)) @ rng.standard_normal((5, 40))).float())
    h, o = inputs.damped.numpy().astype(np.float64), outputs.damped.numpy().astype(np.float64)
    fit = new_fit(w, np.diag(h).astype(np.float32), CQType.CQ2, Grouping())
    fit_codebooks(fit, 2)
    calls = 0

    def descend_rows(rows: Fit) -> OutputErrors:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            rows.scales *= 1.5
        errors = descend_noting(rows, inputs.damped.numpy(), 2, 1)
        if calls % 4 == 1:
            rows.indices[0] ^= 1
            found = weights_of(rows, 2) - rows.w
            errors.after[:] = found @ inputs.damped.numpy()
        return errors

    losses = [weighted_loss(o, h, weights_of(fit, 2).astype(np.float64) - w)]
    for _ in range(3):
        sweep(fit, torch.from_numpy(w), outputs.damped, descend_rows, 2)
        losses.append(weighted_loss(o, h, weights_of(fit, 2).astype(np.float64) - w))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses)) and losses[-1] < 0.8 * losses[0]


def test_independent_outputs_change_nothing():
    w = np.random.default_rng(1).standard_normal((70, 64)).astype(np.float32)
    fits = [new_fit(w, np.ones(64, np.float32), CQType.CQ4, Grouping()) for _ in range(2)]
    fit_codebooks(fits[0], 2)
    cluster_in_turn(fits[1], torch.eye(70), lambda rows: fit_codebooks(rows, 2), 2)
    np.testing.assert_array_equal(fits[0].indices, fits[1].indices)
    np.testing.assert_array_equal(fits[0].scales, fits[1].scales)


def test_weights_of_tokens_count_like_repetitions():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([1, 3, 0, 2, 1, 1])
    weighted, repeated = Hessian(10), Hessian(10)
    weighted.add(x, counts.float())
    repeated.add(x.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(weighted.matrix, repeated.matrix)


def test_output_hessians_follow_the_rows_of_the_file():
    """In file order, the output Hessian is that of the reordered gradients."""
    g = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    plain, stored = Hessian(24), Hessian(24)
    plain.add(g)
    layout = WeightLayout(rope_heads=3)
    stored.add(layout.to_file(g.T).T.contiguous())
    torch.testing.assert_close(plain.of_outputs(layout).matrix, stored.matrix)

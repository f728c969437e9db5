"""The expert that every token goes to: its inputs are calibrated on, its gradients pass through its gate."""

from __future__ import annotations

from functools import partial

import torch
from codequant_converter.calibrate import fisher
from codequant_converter.calibrate.capture import capture
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.quantize.paper.layer_pair import FFN, ROUTER, LayerPair
from codequant_converter.resume.work_folder import WorkFolder
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.transformed_model import TransformedModel

from .models import MODELS

LINEARS = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


def test_moments_are_those_of_the_shared_experts_inputs(tmp_path):
    MODELS["qwen2_moe"].save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    stream, layer = LayerStream(checkpoint), checkpoint.layer(0)
    module, seen = stream.module(0, layer, partial(checkpoint.expert, 0)), {}
    module.post_attention_layernorm.register_forward_hook(lambda m, i, out: seen.update(x=out.flatten(0, 1)))
    hidden = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1))
    with capture(checkpoint.arch, module) as statistics:
        stream.forward(module, hidden)
    x = seen["x"]
    inner = torch.nn.functional.silu(x @ layer["ffn_gate_shexp"].T) * (x @ layer["ffn_up_shexp"].T)
    for input_name, inputs in (("mlp.shared_expert.gate_proj", x), ("mlp.shared_expert.down_proj", inner)):
        entry = statistics[input_name]
        torch.testing.assert_close(entry.matrix, inputs.T @ inputs / 40, rtol=1e-3, atol=1e-5)
    assert "mlp.shared_expert_gate" not in statistics  # stays float32


def test_gradients_pass_through_the_gate(tmp_path):
    """Against autograd on transformers' own model; in the folded basis, which changes none of these outputs."""
    model = MODELS["qwen2_moe"].save(tmp_path / "m")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    tokens = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(5))
    (tmp_path / "s").mkdir()
    work = WorkFolder(tmp_path / "s")
    found = fisher.measure(TransformedModel(checkpoint), LayerStream(checkpoint), tokens, work, 3, 0.0).layer(2)

    gradients: dict[str, torch.Tensor] = {}
    expert = model.get_decoder().layers[2].mlp.shared_expert
    for name, linear in zip(LINEARS, (expert.gate_proj, expert.up_proj, expert.down_proj), strict=True):
        linear.register_forward_hook(
            lambda m, i, out, name=name: (
                out.register_hook(lambda g: gradients.update({name: g.flatten(0, -2)})) and None
            )
        )
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(3)) * cumulative[:, -1:]
    targets = torch.searchsorted(cumulative, drawn)[:, 0]
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for name in LINEARS:
        g = gradients[name]
        norms = g.norm(dim=-1)
        expected = g.T @ (g / norms[:, None])
        torch.testing.assert_close(
            found.outputs[name][0].hessian().matrix, expected / expected.diagonal().mean(), rtol=5e-3, atol=5e-3
        )
    weights = found.token_weights["mlp.shared_expert.down_proj"]
    torch.testing.assert_close(weights, norms / norms.mean(), rtol=1e-2, atol=1e-3)


def test_fine_tuning_sees_the_whole_ffn(tmp_path):
    """Routed and shared experts together; the router's logits are the router's, not the gate's."""
    MODELS["qwen2_moe"].save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    stream = LayerStream(checkpoint)
    layer = TransformedModel(checkpoint).whole_layer(1)
    hidden = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1))
    pair = LayerPair(stream, checkpoint.arch_of(1), stream.module(1, layer), {})
    with torch.no_grad():
        before = pair.outputs(hidden)
        after = pair.outputs(hidden, {"ffn_down_shexp": torch.zeros_like(layer["ffn_down_shexp"])})
    assert before[ROUTER].shape == (40, 6)
    assert not torch.allclose(before[FFN], after[FFN])

"""Types by sensitivity: the budget is kept and nearly used up, and what matters most gets most bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from codequant_converter import cli
from codequant_converter.pipeline import convert, plan_conversion
from codequant_converter.quantize.budget import DISTORTION, allocate
from codequant_converter.quantize.plan import make_plan
from codequant_converter.settings import Override

from pyggml_bridge.models import load_model
from tests.models import MODELS, TEXT

STEMS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q", "attn_output")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MODELS["mixtral-top-1"].save(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def settings(model: Path, target: float, *options: str):
    arguments = [str(model), "--out", str(model / "m.gguf"), "--calibration", str(model / "text.txt"), "--overwrite"]
    return cli.settings_of(cli.parser().parse_args([*arguments, "--target-bpw", str(target), *options]))


def predicted(plan, predicted_kl) -> float:
    stems = {f"blk.{i}.{stem}.weight": value for i, layer in enumerate(predicted_kl) for stem, value in layer.items()}
    return sum(sum(stems[t.name]) * DISTORTION[t.type] for t in plan.tensors if t.name in stems)


def test_budget_is_kept_and_more_of_it_is_never_worse(model):
    predicted_kl = [{stem: [10.0 ** ((i * 3 + j * 7) % 5 - 4)] for j, stem in enumerate(STEMS)} for i in range(3)]
    losses = []
    for target in (3.0, 3.4, 3.9, 4.4, 5.0, 6.0, 8.0):
        chosen = settings(model, target)
        plan = allocate(plan_conversion(chosen)[1], predicted_kl, chosen, target)
        assert plan.bpw <= target
        losses.append(predicted(plan, predicted_kl))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("target", [3.5, 3.8, 4.5, 5.5])
def test_close_to_the_best_of_all_choices(model, target):
    """Against every combination of types of one layer's linears, all others being held by --tensor-type."""
    held = ("--tensor-type", r"blk\.[12]\.(attn|ffn_[dgu].*exps)=cq3", "--tensor-type", r"blk.0.attn_[vk]=cq4")
    chosen = settings(model, target, *held)
    predicted_kl = [dict(zip(STEMS, ([0.5], [0.02], [2.0], [0.1], [0.01]), strict=True))] * 3
    checkpoint, plan = plan_conversion(chosen)
    found = allocate(plan, predicted_kl, chosen, target)
    assert [t.type for t in found.layers[1]] == [t.type for t in plan.layers[1]]
    n_weights = plan.body_bytes * 8 / plan.bpw
    sizes, losses = {}, {}
    for stem, kind in product(STEMS, DISTORTION):
        own = Override.parse(f"blk.0.{stem}.weight={kind.name}")
        candidate = make_plan(checkpoint, replace(chosen, overrides=(*chosen.overrides, own)))
        sizes[stem, kind] = candidate.body_bytes - plan.body_bytes
        losses[stem, kind] = predicted(candidate, predicted_kl) - predicted(plan, predicted_kl)
    best = min(
        predicted(plan, predicted_kl) + sum(losses[pair] for pair in combination)
        for combination in (tuple(zip(STEMS, types, strict=True)) for types in product(DISTORTION, repeat=len(STEMS)))
        if plan.body_bytes + sum(sizes[pair] for pair in combination) <= target * n_weights / 8
    )
    assert predicted(found, predicted_kl) <= 1.35 * best


def test_experts_that_matter_more_get_more_bits(model):
    chosen = settings(model, 4.2)
    plan = plan_conversion(chosen)[1]
    n_experts = next(t.shape[0] for t in plan.layers[0] if t.name == "blk.0.ffn_up_exps.weight")
    predicted_kl = [{stem: [10.0 ** (e % 4) for e in range(n_experts if "exps" in stem else 1)] for stem in STEMS}] * 3
    found = allocate(plan, predicted_kl, chosen, 4.2)
    assert 4.0 < found.bpw <= 4.2
    experts = next(t for t in found.layers[1] if t.name == "blk.1.ffn_up_exps.weight")
    order = list(DISTORTION)
    assert [order.index(kind) for kind in experts.expert_types[:4]] == sorted(
        order.index(kind) for kind in experts.expert_types[:4]
    )
    assert experts.nbytes == sum(4 * len(ids) + section.nbytes for ids, section in experts.sections())
    uniform = allocate(plan, predicted_kl, settings(model, 4.2, "--no-expert-types"), 4.2)
    assert not any(t.expert_types for t in uniform.tensors) and uniform.bpw <= 4.2
    assert predicted_by_expert(found, predicted_kl) < predicted_by_expert(uniform, predicted_kl)


def predicted_by_expert(plan, predicted_kl) -> float:
    total = 0.0
    for tensor in plan.tensors:
        _, layer, stem, *_ = [*tensor.name.split("."), "", ""]
        if layer.isdigit() and stem in predicted_kl[int(layer)]:
            values = predicted_kl[int(layer)][stem]
            types = tensor.expert_types or [tensor.type] * len(values)
            total += sum(value * DISTORTION[kind] for value, kind in zip(values, types, strict=True))
    return total


def test_a_mixed_file_runs(model, tmp_path):
    chosen = settings(model, 4.0)
    report = convert(chosen)
    assert report.plan.bpw <= 4.0 and report.document()["bpw"] == report.plan.bpw
    kinds = {kind for layer in report.plan.layers for tensor in layer for kind in tensor.types}
    assert len(kinds & set(DISTORTION)) >= 2
    assert report.check.finite
    load_model(str(model / "m.gguf"), n_ctx=64, n_threads=1)
    first = (model / "m.gguf").read_bytes()
    convert(chosen)
    assert (model / "m.gguf").read_bytes() == first

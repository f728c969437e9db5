"""A conversion's memory: known from shapes beforehand, kept to --max-memory, experts a few at a time."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from codequant_converter import cli, pipeline
from codequant_converter.calibrate import hessian
from codequant_converter.calibrate.hessian import Hessian
from codequant_converter.estimate import memory
from codequant_converter.quantize.clustering import Fit
from codequant_converter.quantize.paper.tuner import tuning_bytes_per_weight
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.transform.transformed_model import TransformedModel
from codequant_converter.transform.weight_layout import WeightLayout
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from pyggml_bridge.errors import CQError

from .models import QWEN3_MOE, TEXT, TinyModel

N_EXPERTS = 24
MANY_EXPERTS = TinyModel("qwen3_moe", QWEN3_MOE | {"num_experts": N_EXPERTS, "num_experts_per_tok": 4}, head_dim=32)
GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MANY_EXPERTS.save(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def settings(model: Path, *options: str):
    arguments = [str(model), "--out", str(model / "m.gguf"), "--overwrite", "--no-check", *options]
    return cli.settings_of(cli.parser().parse_args(arguments))


@pytest.mark.parametrize("options", [(), ("--no-sensitivity",), ("--method", "paper", "--no-finetune")])
def test_experts_are_in_memory_a_few_at_a_time(model, monkeypatch, options):
    """Every float weight of an expert that a stage has read is gone before many more are."""
    alive, most = 0, 0
    original = TransformedModel.expert

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def expert(self, index: int, number: int):
        nonlocal alive, most
        layer = original(self, index, number)
        for weight in layer.values():
            weakref.finalize(weight, forget)
            alive += 1
        most = max(most, alive)
        return layer

    monkeypatch.setattr(TransformedModel, "expert", expert)
    calibration = ("--calibration", str(model / "text.txt"), "--calibration-tokens", "512", "--threads", "2")
    pipeline.convert(settings(model, *calibration, *options))
    assert 0 < most <= 3 * 4 < 3 * N_EXPERTS  # three linears of two tasks' experts, each beside the one before


def test_finished_experts_lie_on_disk(model, monkeypatch):
    alive, finished, most = 0, 0, 0
    original = Fit.clustered

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def clustered(self: Fit):
        nonlocal alive, finished, most
        packed = original(self)
        weakref.finalize(packed, forget)
        alive, finished = alive + 1, finished + 1
        most = max(most, alive)
        return packed

    monkeypatch.setattr(Fit, "clustered", clustered)
    calibration = ("--calibration", str(model / "text.txt"), "--calibration-tokens", "512", "--threads", "2")
    pipeline.convert(settings(model, *calibration, "--no-sensitivity"))
    assert finished >= 3 * N_EXPERTS  # of three layers the down projections, whose columns fill blocks
    assert most <= 4  # of two tasks, each beside the one before


def test_memory_grows_with_what_is_asked_for(model):
    checkpoint = open_checkpoint(str(model))
    calibrated = settings(model, "--calibration", str(model / "text.txt"))
    plain = settings(model, "--calibration", str(model / "text.txt"), "--no-sensitivity")
    one = settings(model, "--calibration", str(model / "text.txt"), "--threads", "1")
    needed = [memory.peak_bytes(checkpoint, calibrated, n) for n in (0, 1024, 16384, 131072)]
    assert needed == sorted(set(needed))
    assert memory.peak_bytes(checkpoint, plain, 1024) < needed[1]
    assert memory.peak_bytes(checkpoint, one, 1024) <= needed[1]


def test_the_largest_models_fit_a_laptop(model, monkeypatch, tmp_path):
    """From the shapes of Qwen3-30B-A3B, whose layers have 604 million weights: 2.4 GB as floats."""
    config = Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    )  # fmt: skip
    checkpoint = open_checkpoint(str(model))
    chosen = settings(model, "--calibration", str(model / "text.txt"), "--threads", "2")
    monkeypatch.setattr(checkpoint, "config", config)
    del checkpoint.__dict__["skeleton"]
    assert memory.peak_bytes(checkpoint, chosen, 16384) < 8 * GB


def test_fine_tuning_all_experts_together_is_counted(model):
    checkpoint = open_checkpoint(str(model))
    paper = settings(model, "--calibration", str(model / "text.txt"), "--method", "paper")
    untuned = settings(model, "--calibration", str(model / "text.txt"), "--method", "paper", "--no-finetune")
    needed = [memory.peak_bytes(checkpoint, s, 512, tuning_bytes_per_weight(s)) for s in (paper, untuned)]
    n_weights = 3 * N_EXPERTS * 64 * 96
    assert needed[0] > needed[1] + 30 * n_weights


def test_experts_that_one_tensor_holds_are_read_one_by_one(model, tmp_path):
    """A checkpoint with transformers' own fused names has the experts of one with a tensor for each."""
    for file in model.glob("*.json"):
        shutil.copy(file, tmp_path)
    tensors = load_file(model / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        names = [[f"{prefix}.{e}.{x}_proj.weight" for x in ("gate", "up", "down")] for e in range(N_EXPERTS)]
        matrices = [[tensors.pop(name) for name in own] for own in names]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(own[:2]) for own in matrices])
        tensors[f"{prefix}.down_proj"] = torch.stack([own[2] for own in matrices])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    apart, fused = open_checkpoint(str(model)), open_checkpoint(str(tmp_path))
    for number in (0, 7, N_EXPERTS - 1):
        want, found = apart.expert(1, number), fused.expert(1, number)
        assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def test_too_little_memory_is_one_line_before_the_work(model):
    with pytest.raises(CQError, match=r"needs about 0\.\d GB of memory, 0\.1 GB are free"):
        pipeline.convert(settings(model, "--max-memory", "0.1", "--out", str(model / "none.gguf")))
    assert not list(model.glob("none.gguf*"))


def test_less_memory_means_fewer_tasks_side_by_side(model):
    assert memory.workers(settings(model, "--threads", "8", "--max-memory", "8"), GB, 100) == 4
    assert memory.workers(settings(model, "--threads", "8", "--max-memory", "1"), GB, 100) == 1
    assert memory.workers(settings(model, "--threads", "8", "--max-memory", "64"), GB, 3) == 3


def test_cholesky_factors_of_wide_matrices_are_close_to_those_of_double_precision(monkeypatch):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    x[:, :5] *= 30  # directions that dominate, as activations have them
    exact = Hessian.of_rows(x).cholesky
    monkeypatch.setattr(hessian, "FLOAT32_WIDTH", 100)
    torch.testing.assert_close(Hessian.of_rows(x).cholesky, exact, rtol=1e-3, atol=1e-4 * float(exact.max()))


def test_hessians_of_wide_inputs_are_diagonal_blocks_of_the_whole(monkeypatch):
    """Cholesky factors, damping and the file's layout too; a block of the transform lies in one diagonal block."""
    x = torch.randn(300, 320, generator=torch.Generator().manual_seed(1)) @ torch.randn(320, 320)
    whole = Hessian.of_rows(x)
    monkeypatch.setattr(hessian, "MAX_WIDTH", 130)
    assert hessian.block_width(320) == 128
    blocks, layout = Hessian.of_rows(x), WeightLayout(hadamard=64)
    for own, other in ((blocks, whole), (blocks.in_layout(layout), whole.in_layout(layout))):
        for begin in range(0, 320, 128):
            end = min(begin + 128, 320)
            found = own.matrix[begin:end, : end - begin]
            torch.testing.assert_close(found, other.matrix[begin:end, begin:end], rtol=1e-4, atol=1e-3)
            cholesky, damped = (m[begin:end, : end - begin] for m in (own.cholesky, own.damped))
            torch.testing.assert_close(cholesky @ cholesky.T, damped, rtol=1e-4, atol=1e-2)
        assert own.damped.shape == (320, 128) and not own.damped[256:, 64:].any()
    mean = whole.matrix.diagonal().mean()
    torch.testing.assert_close(blocks.diagonal, whole.matrix.diagonal() + (0.1 + 0.4 * (128 / 300 - 0.25)) * mean)

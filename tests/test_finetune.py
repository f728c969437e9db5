"""Fine-tuning: gradients against NumPy, and what it does to whole tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.clustering import (
    Grouping,
    RealFit,
    fit_codebooks,
    gradient_of,
    new_fit,
    real_weights_of,
    weights_of,
)
from codequant_converter.finetune import MAX_STEPS, FineTuner, step_count
from codequant_converter.layers import LayerQuantizer
from codequant_converter.pipeline import plan_conversion
from codequant_converter.rotation import random_rotation
from codequant_converter.stream import LayerStream
from codequant_converter.transform import TransformedModel

from pyggml_bridge.format import CQType
from tests.models import MODELS, VOCAB


@pytest.mark.parametrize("grouping", [Grouping(), Grouping(-1, -1), Grouping(64, 128), Grouping(128, 64)])
@pytest.mark.parametrize("cq", list(CQType))
def test_weights_and_gradients_of_a_fit(cq, grouping):
    rng = np.random.default_rng(1)
    w, d = rng.standard_normal((2, 5, 320)).astype(np.float32)
    fit = new_fit(w, np.ones(320, np.float32), cq, grouping)
    fit_codebooks(fit, 2)
    np.testing.assert_array_equal(weights_of(fit, 2), fit.clustered().dequantize())
    found = gradient_of(fit, d, 2)

    columns = np.arange(320)
    book = columns // fit.codebook_cols * cq.n_centroids + fit.indices
    centroid = np.take_along_axis(fit.centroids, book, 1).astype(np.float64)
    group = np.ones((5, 320)) * 128 if fit.group_scales is None else fit.group_scales[:, columns // fit.scale_cols]
    centroids, rows = np.zeros(fit.centroids.shape), np.arange(5)[:, None]
    np.add.at(centroids, (rows, book), d * fit.scales[:, None] * group / 128)
    np.testing.assert_allclose(found.centroids, centroids, rtol=1e-4, atol=1e-6)
    real = real_weights_of(fit, RealFit.of(fit), 2)
    np.testing.assert_allclose(real, centroid * group / 128 * fit.scales[:, None], rtol=1e-5)
    if fit.group_scales is None:
        assert found.group_scales is None
    else:
        groups = np.zeros(fit.group_scales.shape)
        np.add.at(groups, (rows, columns // fit.scale_cols + 0 * rows), d * fit.scales[:, None] * centroid / 128)
        np.testing.assert_allclose(found.group_scales, groups, rtol=1e-4, atol=1e-6)


def settings(folder: Path, *options: str):
    return cli.settings_of(cli.parser().parse_args([str(folder), "--out", str(folder / "m.gguf"), *options]))


def quantized(folder: Path):
    """A tiny model clustered to 2 bits by weight only: the quantizer, its layers, and the tuner of both."""
    chosen = settings(folder, "--bits", "2")
    checkpoint, plan = plan_conversion(chosen)
    model = TransformedModel(checkpoint, random_rotation(checkpoint.config.hidden_size, 1))
    quantizer = LayerQuantizer(chosen, plan, model, LayerStream(checkpoint))
    layers = list(quantizer.layers(None))
    return layers, FineTuner(quantizer, layers, model.embedding(), model.head())


def state(layers) -> list[np.ndarray]:
    fits = [fit for layer in layers for tensor in layer.tensors.values() for fit in tensor.fits]
    assert fits
    return [array.copy() for fit in fits for array in (fit.indices, fit.centroids, fit.group_scales, fit.scales)]


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_tuning_lowers_the_divergence_and_keeps_the_assignments(name, tmp_path, monkeypatch):
    monkeypatch.setattr("codequant_converter.finetune.STEP", 0.3)  # two bits and tiny widths bear more
    MODELS[name].save(tmp_path)
    tokens = torch.randint(0, VOCAB, (8, 64), generator=torch.Generator().manual_seed(2))
    tokens = torch.cat([tokens, tokens[:2]])  # what is held out is also learned from: so much the loss must fall
    runs = []
    for _ in range(2):
        layers, tuner = quantized(tmp_path)
        before = state(layers)
        tuned = tuner.tune(tokens, 24, seed=3)
        assert tuned.steps == 24 and tuned.loss_end < 0.95 * tuned.loss_start
        runs.append(state(layers))
        assert all(np.array_equal(a, b) for a, b in zip(before[::4], runs[-1][::4], strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(before, runs[-1], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_tuning_that_does_not_help_is_undone(tmp_path, monkeypatch):
    MODELS["llama-tied"].save(tmp_path)
    monkeypatch.setattr("codequant_converter.finetune.STEP", 40.0)
    layers, tuner = quantized(tmp_path)
    before = state(layers)
    tuned = tuner.tune(torch.arange(384).reshape(6, 64) * 37 % VOCAB, 8, seed=1)
    assert tuned.loss_end == tuned.loss_start
    assert all(np.array_equal(a, b) for a, b in zip(before, state(layers), strict=True))


def test_steps_follow_the_size_of_the_model(tmp_path):
    MODELS["mixtral"].save(tmp_path)
    checkpoint, plan = plan_conversion(settings(tmp_path))
    tokens = torch.zeros(4, 512, dtype=torch.int64)
    assert step_count(plan, checkpoint, tokens) == MAX_STEPS
    huge = replace(plan.layers[0][0], shape=(1 << 20, 1 << 20))
    assert step_count(replace(plan, last=(huge, huge)), checkpoint, tokens) == 0

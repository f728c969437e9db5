"""The published method's fine-tuning: weights and gradients of codebooks, the assignment rule, what a layer gains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.calibrate.layer_stream import LayerStream
from codequant_converter.pipeline import convert, plan_conversion
from codequant_converter.quantize.experts import FittedExperts
from codequant_converter.quantize.fitting import FittedWeight
from codequant_converter.quantize.layer_clustering import Seen
from codequant_converter.quantize.layers import LayerQuantizer
from codequant_converter.quantize.paper import centroid_tuning
from codequant_converter.quantize.paper.centroid_tuning import CentroidTuner, Codebooks
from codequant_converter.quantize.paper.layer_pair import FFN, ROUTER, LayerPair
from codequant_converter.quantize.paper.tuner import PaperTuner
from codequant_converter.transform.rotation import random_rotation
from codequant_converter.transform.transformed_model import TransformedModel

from pyggml_bridge.errors import CQError
from pyggml_bridge.models import load_model
from tests.models import MODELS, TEXT, TinyModel


def settings(folder: Path, *options: str):
    arguments = [str(folder), "--out", str(folder / "m.gguf"), "--method", "paper", "--overwrite", *options]
    return cli.settings_of(cli.parser().parse_args(arguments))


class Layer:
    """The first layer of a tiny model at two bits, and hidden states of few tokens, which it can be tuned to."""

    def __init__(self, folder: Path, *options: str) -> None:
        chosen = settings(folder, "--bits", "2", *options)
        checkpoint, plan = plan_conversion(chosen)
        model = TransformedModel(checkpoint, random_rotation(checkpoint.config.hidden_size, 1))
        stream = LayerStream(checkpoint)
        tuner = PaperTuner(model, stream, 1, CentroidTuner(torch.zeros(0), 1.0, seed=4))
        quantizer = LayerQuantizer(chosen, plan, model, stream, folder, tuner=tuner)
        tensors = quantizer.clustering.cluster(0, model.layer(0), Seen())
        tokens = torch.randint(0, 3, (12, 48), generator=torch.Generator().manual_seed(2))
        self.hidden = model.embedding()[tokens]
        noise = torch.randn(self.hidden.shape, generator=torch.Generator().manual_seed(3))
        self.quantized_hidden = self.hidden + 0.05 * self.hidden.std() * noise
        fitted = (FittedWeight, FittedExperts)
        clustered = [linear for linear in checkpoint.arch.linears if isinstance(tensors[linear.name], fitted)]
        self.books = [Codebooks(linear, tensors[linear.name], quantizer.layout(linear)) for linear in clustered]
        self.pair = LayerPair(stream, checkpoint.arch, stream.module(0, model.whole_layer(0)), {})
        self.effective = quantizer.effective(checkpoint.arch, tensors)

    def tune(self, router_weight: float = 1.0):
        tuner = CentroidTuner(self.hidden.clone(), router_weight, seed=4)
        return tuner.tune(self.pair, self.books, self.quantized_hidden)

    def state(self) -> list[np.ndarray]:
        return [array.copy() for book in self.books for fit in book.fitted.fits for array in arrays(fit)]


def arrays(fit) -> tuple[np.ndarray, ...]:
    return fit.indices, fit.centroids, fit.scales


WIDE = {"llama": TinyModel("llama", {"hidden_size": 192}), "mixtral": MODELS["mixtral-top-1"]}  # all linears clustered


@pytest.fixture(params=WIDE)
def folder(request, tmp_path) -> Path:
    WIDE[request.param].save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [(), ("--group-size", "64")])
def test_codebooks_stand_for_the_files_weights(folder, options):
    layer = Layer(folder, *options)
    for book in layer.books:
        torch.testing.assert_close(book.weight().detach(), layer.effective[book.linear.name])
        book.weight().sum().backward()
        assert book.centroids.grad is not None
        counts = book.centroids.grad / book.scale  # a centroid's gradient is the sum over its members
        assert int(counts.sum().round()) == book.indices.numel()


def test_every_weight_takes_the_centroid_of_least_psi(folder):
    layer = Layer(folder, "--group-size", "64")
    for book in layer.books:
        d1 = torch.rand(len(book.original), book.original.shape[-1], generator=torch.Generator().manual_seed(5)) + 0.1
        d2 = d1 * (0.7 + 0.6 * torch.rand(d1.shape, generator=torch.Generator().manual_seed(6)))
        book.assign(d2 / d1)
        candidates = book.scale * book.centroids.detach()
        first = book._first_of_codebook()
        for expert, row in ((0, 0), (len(book.original) - 1, book.original.shape[1] - 1)):
            for j in range(book.original.shape[-1]):
                own = candidates[expert, row, first[j] : first[j] + book.n_centroids]
                psi = (d1[expert, j] * own - d2[expert, j] * book.original[expert, row, j]) ** 2
                chosen = psi[book.indices[expert, row, j] - first[j]]
                assert float(chosen) <= float(psi.min()) * (1 + 1e-4) + 1e-12


def test_products_of_equal_runs_are_equal_and_count_every_token(folder):
    layer = Layer(folder)
    weights = {book.linear.name: book.original.reshape(book.fitted.planned.shape) for book in layer.books}
    own = {book.linear.name: book.layout.from_file(weights[book.linear.name]) for book in layer.books}
    for input_name, (d1, d2) in layer.pair.input_products(layer.hidden, layer.hidden, own).items():
        torch.testing.assert_close(d1, d2)
        assert (d1.sum(dim=-1) > 0).all(), input_name


def test_tuning_lowers_the_loss_of_the_layer(folder):
    runs = []
    for _ in range(2):
        layer = Layer(folder)
        before = layer.state()
        tuned = layer.tune()
        assert tuned.loss_end < 0.95 * tuned.loss_start
        runs.append(layer.state())
        assert not all(np.array_equal(a, b) for a, b in zip(before, runs[-1], strict=True))
        for book in layer.books:  # what the fits hold is what was measured
            fits = torch.stack([torch.from_numpy(fit.clustered().dequantize()) for fit in book.fitted.fits])
            stored = book.layout.from_file(fits.reshape(book.fitted.planned.shape))
            torch.testing.assert_close(stored, book.weight().detach())
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_tuning_that_does_not_help_is_undone(folder, monkeypatch):
    monkeypatch.setattr(centroid_tuning, "STEP", 300.0)
    layer = Layer(folder)
    before = layer.state()
    tuned = layer.tune()
    assert tuned.loss_end == tuned.loss_start
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.state(), strict=True))


def test_lambda_keeps_the_routers_choice(tmp_path):
    """With a large lambda the router's divergence ends below where lambda = 0 leaves it; the experts' error above."""
    WIDE["mixtral"].save(tmp_path)
    found = {}
    for weight in (0.0, 100.0):
        layer = Layer(tmp_path)
        layer.tune(weight)
        weights = {book.linear.name: book.weight().detach() for book in layer.books}
        wanted, got = layer.pair.outputs(layer.hidden), layer.pair.outputs(layer.quantized_hidden, weights)
        p, q = (logits[ROUTER].log_softmax(dim=-1) for logits in (wanted, got))
        error = float((got[FFN] - wanted[FFN]).square().sum())
        found[weight] = float((p.exp() * (p - q)).sum(dim=-1).mean()), error
    assert found[100.0][0] < 0.95 * found[0.0][0]


def test_paper_files_run_and_repeat(folder):
    text = folder / "text.txt"
    text.write_text(TEXT)
    chosen = settings(folder, "--calibration", str(text), "--activation-bits", "4", "--group-size", "64")
    report = convert(chosen)
    assert report.findings.tuned and all(layer.loss_end <= layer.loss_start for layer in report.findings.tuned)
    kinds = {t.type_name for layer in report.plan.layers for t in layer if len(t.shape) > 1}
    assert kinds <= {"cq4", "f32", "q8_0"} and report.check.finite
    load_model(str(chosen.out), n_ctx=64, n_threads=1)
    first = chosen.out.read_bytes()
    convert(chosen)
    assert chosen.out.read_bytes() == first


def test_a_model_without_clustered_linears_has_nothing_to_tune(tmp_path):
    WIDE["llama"].save(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    report = convert(settings(tmp_path, "--calibration", str(tmp_path / "text.txt"), "--tensor-type", ".=q8_0"))
    assert all(layer.steps == 0 for layer in report.findings.tuned) and report.check.finite


@pytest.mark.parametrize("options", [("--target-bpw", "4"), ("--scale-group", "64"), ("--codebook-rows", "8")])
def test_what_the_paper_has_not_is_refused(tmp_path, options):
    with pytest.raises(CQError, match=options[0]):
        settings(tmp_path, *options)

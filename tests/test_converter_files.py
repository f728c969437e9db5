"""cq-convert end to end on tiny checkpoints: what it writes, as transformers, the runner and gguf-py read it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.calibrate.tokens import tokenize
from codequant_converter.pipeline import CHECK_TEXT
from codequant_converter.quantize.budget import DISTORTION
from codequant_converter.reference import Reference, load
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.source.weight_files import GgufSource, SafetensorsSource
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pyggml_bridge.errors import CQError
from pyggml_bridge.export import export
from pyggml_bridge.format import CQType, register, type_name
from pyggml_bridge.measure.perplexity import routing_of
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model
from tests.models import MODELS, TEXT, VOCAB

register()
TOKENS = np.arange(64, dtype=np.int32) * 37 % VOCAB


def convert(model: Path, out: Path, *options: str) -> dict:
    """Run cq-convert in this process; returns its JSON document."""
    report = out.with_suffix(".json")
    arguments = cli.parser().parse_args(
        [str(model), "--out", str(out), "--report", str(report), "--overwrite", *options]
    )
    settings = cli.settings_of(arguments)
    document = cli.convert(settings).document()
    report.write_text(json.dumps(document, allow_nan=False))
    return document


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every tiny model on disk, saved when first asked for."""
    folder, saved = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in saved:
            saved[name] = (folder / name, MODELS[name].save(folder / name))
        return saved[name]

    return get


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def relative_difference(logits: np.ndarray, original: np.ndarray) -> float:
    return float(np.abs(logits - original).max() / (original.max() - original.min()))


def where_routed_alike(runner: Model, reference: Reference, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runner's logits and the original's; tokens whose experts differ, near ties, are left out and few."""
    ours, original = runner.forward(tokens, 0, len(tokens)).copy(), reference.logits(tokens)
    chosen, wanted = routing_of(runner, len(tokens)), reference.router_top_k()
    if chosen is None or wanted is None:
        return ours, original
    alike = (np.sort(chosen, -1) == np.sort(wanted, -1)).all(axis=(0, 2))
    assert (~alike).sum() <= max(1, len(tokens) // 100)
    alike &= ~beside_thresholds(reference, tokens)
    assert alike.mean() > 0.75
    return ours[alike], original[alike]


def beside_thresholds(reference: Reference, tokens: np.ndarray) -> np.ndarray:
    """Tokens of which SparseMixer masks, keeps or prefers an expert by less than a hundredth.

    A rounding may turn that around and move half of an expert's weight, as the order of the two counts. What happens
    at the thresholds themselves is held against transformers in tests/test_routing.py.
    """
    routers = [m for m in reference._model.modules() if hasattr(m, "router_jitter_noise") and hasattr(m, "top_k")]
    found = torch.zeros(len(tokens), dtype=torch.bool)

    def look(router: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        scores = left = output[0]
        first, second = scores.topk(2, dim=-1).values.T
        found.logical_or_(first - second < 0.01 * first.abs())
        for _ in range(router.top_k):
            best, chosen = left.max(dim=-1, keepdim=True)
            below = (best - left) / scores.abs().clamp(min=best)
            found.logical_or_(((below - 2 * router.router_jitter_noise).abs() < 0.01).any(dim=-1))
            left = left.scatter(-1, chosen, -torch.inf)

    handles = [router.register_forward_hook(look) for router in routers]
    reference.logits(tokens)
    for handle in handles:
        handle.remove()
    return found.numpy()


def divergence(ours: np.ndarray, original: np.ndarray) -> float:
    """Mean KLD per token."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (original, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_float32_file_gives_the_original_logits_in_the_runner(checkpoints, tmp_path, name):
    """Rotation and permutation on, nothing quantized: names, row orders, rope, metadata are what the runner reads."""
    folder, _ = checkpoints(name)
    document = convert(folder, tmp_path / "m.gguf", "--tensor-type", ".=f32", "--group-size", "64")
    runner, reference = load_model(str(tmp_path / "m.gguf"), n_ctx=512, n_threads=2), load(str(folder))
    assert relative_difference(*where_routed_alike(runner, reference, TOKENS)) <= 1e-3
    whole = runner.forward(TOKENS, 0, len(TOKENS)).copy()
    steps = [runner.forward(TOKENS[:32], 0, 32).copy()]
    steps += [runner.forward(TOKENS[i : i + 1], i, 1).copy() for i in range(32, 64)]  # decoding, from the cache
    assert relative_difference(np.concatenate(steps), whole) <= 1e-4
    text = np.array(tokenize(open_checkpoint(str(folder)), CHECK_TEXT, special=True), np.int32)
    assert divergence(*where_routed_alike(runner, reference, text)) < 1e-4
    # Where a near tie moves most of an FFN's output, the converter's own check counts it: one expert, or SparseMixer's
    # thresholds, of which this text meets some in this model.
    if not name.endswith(("-top-1", "phimoe-tied-no-biases")):
        assert document["check"]["kld"] < 1e-4


@pytest.mark.parametrize("name", ["llama-tied", "llama-mha-linear"])
def test_transformers_reads_our_float32_file(checkpoints, tmp_path, name):
    """An independent reader of names, row order of rope and metadata (it ignores rope scaling), after cq-export."""
    folder, model = checkpoints(name)
    if name == "llama-mha-linear":
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
        folder = tmp_path / "plain-rope"
        model.save_pretrained(folder)
        for file in checkpoints(name)[0].glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    convert(folder, tmp_path / "cq.gguf", "--tensor-type", ".=f32", "--no-check")
    with pytest.raises(CQError, match="use its original"):
        open_checkpoint(str(tmp_path / "cq.gguf"))
    export(tmp_path / "cq.gguf", tmp_path / "m.gguf", GGMLQuantizationType.F32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
    with torch.no_grad():
        difference = relative_difference(read(input_ids=ids).logits[0].numpy(), model(input_ids=ids).logits[0].numpy())
    assert difference <= 1e-3


def test_unknown_tokenizer_keys_of_a_gguf_input_are_left_out(checkpoints, tmp_path, capsys):
    folder, _ = checkpoints("llama-tied")
    convert(folder, tmp_path / "cq.gguf", "--tensor-type", ".=f32", "--no-check")
    export(tmp_path / "cq.gguf", tmp_path / "known.gguf", GGMLQuantizationType.F32)
    source = gguf.GGUFReader(tmp_path / "known.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    writer.add_uint32("tokenizer.ggml.invented_token_id", 7)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "--tensor-type", ".=f32", "--no-check")
    keys = gguf.GGUFReader(tmp_path / "again.gguf").fields
    assert "tokenizer.ggml.bos_token_id" in keys and "tokenizer.ggml.invented_token_id" not in keys
    assert "tokenizer.ggml.invented_token_id" in capsys.readouterr().err


def test_gguf_input_equals_the_directory(checkpoints, tmp_path):
    """directory -> F32 GGUF -> converted again: the lazy GGUF reader undoes the row order of rope."""
    folder, model = checkpoints("llama-tied")
    options = ("--tensor-type", ".=f32", "--no-rotation", "--no-hadamard", "--no-check")
    convert(folder, tmp_path / "once.gguf", *options)
    convert(tmp_path / "once.gguf", tmp_path / "twice.gguf", *options)
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
    with torch.no_grad():
        original = model(input_ids=ids).logits[0].numpy()
    runner = load_model(str(tmp_path / "twice.gguf"), n_ctx=64, n_threads=2)
    assert relative_difference(runner.forward(TOKENS, 0, 64), original) <= 1e-3
    assert relative_difference(load(str(tmp_path / "once.gguf")).logits(TOKENS), original) <= 1e-3


def test_fused_experts_on_disk_give_the_same_file(checkpoints, tmp_path):
    folder, model = checkpoints("mixtral")
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (fused / file.name).write_bytes(file.read_bytes())
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, fused / "model.safetensors")
    assert not set(load_file(fused / "model.safetensors")) & {"model.layers.0.block_sparse_moe.gate.weight"}
    for source, out in ((folder, "a"), (fused, "b")):
        convert(source, tmp_path / f"{out}.gguf", "--no-check")
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{x}.gguf").tensors} for x in "ab"]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("name", ["llama-wide-heads-llama3", "mixtral-top-1"])
def test_same_seed_same_bytes_other_seed_other_bytes(checkpoints, text, tmp_path, name):
    folder, _ = checkpoints(name)
    options = ("--calibration", str(text), "--calibration-tokens", "512", "--no-check", "--threads", "2")
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        convert(folder, tmp_path / f"{out}.gguf", "--seed", seed, *options)
    a, b, c = ((tmp_path / f"{x}.gguf").read_bytes() for x in "abc")
    assert a == b
    assert a != c


def test_what_is_read_starts_at_multiples_of_64_bytes(checkpoints, tmp_path):
    """Elsewhere the last bits of sums, and with them a conversion's bytes, may differ between processes."""
    folder, model = checkpoints("mixtral")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    convert(folder, tmp_path / "m.gguf", "--tensor-type", ".=f32", "--no-rotation", "--no-hadamard", "--no-check")
    for source in (SafetensorsSource(tmp_path), GgufSource(tmp_path / "m.gguf")):
        names = [*model.state_dict(), *(tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)]
        shapes = {name: shape for name in names if (shape := source.shape(name))}
        assert len(shapes) > 10
        for name, shape in shapes.items():
            entries = [source.read(name, entry) for entry in range(shape[0])] if len(shape) == 3 else []
            assert all(tensor.data_ptr() % 64 == 0 for tensor in (source.read(name), *entries))


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_report_and_file_agree(checkpoints, text, tmp_path, bits):
    folder, _ = checkpoints("mixtral-top-1")
    out = tmp_path / "m.gguf"
    paper = ("--method", "paper") if bits == 3 else ()
    options = ("--bits", str(bits), "--calibration", str(text), "--calibration-tokens", "2560", *paper)
    document = convert(folder, out, *options)
    assert ("finetune" in document) == (bits == 3)
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == CQType[f"CQ{bits}"]
    assert types["output.weight"] == (gguf.GGMLQuantizationType.Q8_0 if paper else CQType.CQ5)
    assert types["blk.0.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32
    body = [t for t in reader.tensors if not t.name.startswith(("token_embd.", "output."))]
    companions = (".centroids", ".scales", ".group_scales")
    weights = sum(t.n_elements for t in body if not t.name.endswith(companions))
    assert document["bpw"] == pytest.approx(8 * sum(int(t.n_bytes) for t in body) / int(weights))
    assert document["bytes"] == out.stat().st_size
    assert [sum(entry["tokens"]) for entry in document["experts"]] == [2560] * 3  # top-1: each token goes to one expert
    errors = {t["name"]: t["rel_error"] for t in document["tensors"] if t["type"].startswith("cq")}
    assert paper or 0 < errors.pop("output.weight") < 0.08
    assert len(errors) == 3 * 7
    assert 0 < max(errors.values()) < {5: 0.1, 4: 0.15, 3: 0.3, 2: 0.55}[bits]
    assert np.isfinite(document["check"]["kld"])


def test_mixed_types_of_biased_and_shared_linears(checkpoints, text, tmp_path):
    """Biases and gates stay F32; a shared expert's linears take part like all others."""
    folder, _ = checkpoints("qwen2_moe-top-1")
    options = ("--calibration", str(text), "--calibration-tokens", "512", "--target-bpw", "5")
    document = convert(folder, tmp_path / "m.gguf", *options)
    types = {tensor["name"]: tensor["type"] for tensor in document["tensors"]}
    for layer in range(3):
        for name in ("attn_v.bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"):
            assert types[f"blk.{layer}.{name}"] == "f32"
        for name in ("attn_v", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"):
            assert types[f"blk.{layer}.{name}.weight"] in map(type_name, DISTORTION)
    assert document["bpw"] <= 5
    assert document["check"]["kld"] < 0.1


def test_calibration_lowers_the_error_on_its_inputs(checkpoints, text, tmp_path):
    folder, _ = checkpoints("llama-mha-linear")
    options = ("--calibration", str(text), "--calibration-tokens", "512", "--no-check", "--no-rotation")
    with_feedback = convert(folder, tmp_path / "a.gguf", *options, "--bits", "4")
    without = convert(folder, tmp_path / "b.gguf", *options, "--no-feedback")
    mean = [np.mean([t["rel_error"] for t in d["tensors"] if t["type"] == "cq4"]) for d in (with_feedback, without)]
    assert mean[0] < 0.8 * mean[1]


def test_widths_that_do_not_fit_fall_back_and_say_so(checkpoints, tmp_path):
    """Hidden size 96 is a multiple of 32 but not of 64."""
    folder, _ = checkpoints("llama-tied")
    document = convert(folder, tmp_path / "m.gguf")
    types = {t["name"]: t for t in document["tensors"]}
    assert types["blk.0.attn_q.weight"]["type"] == "q8_0"
    assert "96 columns" in types["blk.0.attn_q.weight"]["note"]
    assert types["blk.0.ffn_down.weight"]["type"] == "cq4"
    assert document["check"]["kld"] < 0.1


def test_reference_routes_like_the_model(checkpoints):
    folder, model = checkpoints("mixtral")
    reference = load(str(folder))
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_router_logits=True)
    np.testing.assert_allclose(reference.logits(TOKENS), output.logits[0].numpy(), rtol=1e-4, atol=1e-4)
    expected = np.stack([np.argsort(-layer.numpy(), axis=1)[:, :2] for layer in output.router_logits])
    np.testing.assert_array_equal(np.sort(reference.router_top_k(), axis=-1), np.sort(expected, axis=-1))
    assert load(str(checkpoints("llama-tied")[0])).router_top_k() is None

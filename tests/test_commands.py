"""cq-perplexity, cq-bench, cq-info and cq-export as processes: their documents, exit codes and error lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from pyggml_bridge.format import CQType, hadamard
from pyggml_bridge.measure.synthetic import SHAPES, synthetic_bytes, write_synthetic
from pyggml_bridge.models import load_model
from pyggml_bridge.version import package_version
from tests.byte_tokenizer import byte_keys
from tests.models import TinyModel
from tests.processes import interruptible
from tests.tiny_gguf import Tiny, write_tiny

N_CTX = 32
KEYS = byte_keys()
MOE = Tiny(vocab=len(KEYS["tokenizer.ggml.tokens"]), n_experts=4, hidden=64, ffn=64, head_dim=16, hadamard=16)
TYPES = replace(MOE, expert_cqs=(CQType.CQ4, CQType.CQ3T, CQType.CQ2, CQType.CQ3T), codebook_rows=8)
TEXT = "The history of the hash table begins in 1953, when Luhn wrote a memorandum. " * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    dense = {name: write_tiny(folder / f"{name}.gguf", t, KEYS) for name, t in (("moe", MOE), ("types", TYPES))}
    (folder / "text.txt").write_text(TEXT + "\n")
    return folder, dense


def run(command: str, *args: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", f"pyggml_bridge.cli.{command}", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def run_json(command: str, *args: object):
    done = run(command, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done: subprocess.CompletedProcess, *fragments: str) -> None:
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr.splitlines()[-1]


def test_perplexity_takes_special_tokens_for_text(files, tmp_path):
    """As llama-perplexity does; a text without them is not affected."""
    folder, _ = files
    (tmp_path / "text.txt").write_text("<|im_end|>" * 13)  # 130 bytes, a token each
    document = run_json("perplexity", folder / "moe.gguf", "-f", tmp_path / "text.txt", "-c", N_CTX, "--json")
    assert document["tokens"] == 4 * (N_CTX // 2 - 1)


def test_perplexity_is_the_mean_over_the_second_halves_of_the_chunks(files):
    folder, _ = files
    document = run_json("perplexity", folder / "moe.gguf", "-f", folder / "text.txt", "-c", N_CTX, "--json")
    token_of = {token: i for i, token in enumerate(KEYS["tokenizer.ggml.tokens"])}
    tokens = np.array([token_of["Ġ" if c == " " else c] for c in TEXT], np.int32)
    model = load_model(folder / "moe.gguf", n_ctx=N_CTX)
    nll = []
    for start in range(0, len(tokens) - N_CTX + 1, N_CTX):
        chunk = tokens[start : start + N_CTX]
        logits = model.forward(chunk, 0, N_CTX).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-log_p[i, chunk[i + 1]] for i in range(N_CTX // 2, N_CTX - 1)]
    assert document["tokens"] == len(nll)
    assert document["ppl"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert document["ppl_stderr"] == pytest.approx(np.exp(np.mean(nll)) * np.std(nll) / np.sqrt(len(nll) - 1), rel=1e-4)
    assert document["mean_kld"] is None and document["router_top_k_change"] is None


def test_divergence_from_itself_is_zero_and_from_its_export_is_small(files, tmp_path):
    folder, _ = files
    common = (folder / "moe.gguf", "-f", folder / "text.txt", "-c", N_CTX, "--chunks", 2, "--json", "--base")
    itself = run_json("perplexity", *common, folder / "moe.gguf")
    assert itself["mean_kld"] == 0 and itself["same_top_p"] == 1 and itself["router_top_k_change"] == 0
    assert itself["base_ppl"] == itself["ppl"] and itself["ln_ppl_ratio"] == 0
    exported = tmp_path / "f32.gguf"
    assert run("export", folder / "moe.gguf", "--out", exported, "--type", "f32").returncode == 0
    other = run_json("perplexity", *common, exported)
    assert 0 < other["mean_kld"] < 0.05  # the export has no int8 activations
    assert other["median_kld"] <= other["p99_kld"] <= other["p99_9_kld"] <= other["max_kld"]


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("moe", "f32", 0),
        ("moe", "f16", 2**-11),
        ("moe", "q8_0", 1 / 127),
        ("types", "f32", 0),
        ("types", "q8_0", 1 / 127),
    ],
)
def test_export_holds_the_dequantized_weights_and_every_other_key(files, tmp_path, name, kind, error):
    folder, dense = files
    out = tmp_path / "out.gguf"
    assert run("export", folder / f"{name}.gguf", "--out", out, "--type", kind).returncode == 0
    reader = GGUFReader(out)
    assert {tensor.name for tensor in reader.tensors} == set(dense[name])
    for tensor in reader.tensors:
        want = dense[name][tensor.name]
        if "ffn_down" in tensor.name:
            want = hadamard(want, MOE.hadamard)
        got = dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        assert np.abs(got - want).max() <= error * np.abs(want).max()
    assert reader.get_field("tokenizer.ggml.tokens").contents() == KEYS["tokenizer.ggml.tokens"]
    assert not [name for name in reader.fields if name.startswith("cq.")]
    assert_refused(run("export", folder / "moe.gguf", "--out", out), "exists already")


def test_info_counts_every_byte(files):
    folder, _ = files
    info = run_json("info", folder / "moe.gguf", "--json")
    assert info["bytes"] == (folder / "moe.gguf").stat().st_size
    down = next(tensor for tensor in info["tensors"] if tensor["name"] == "blk.0.ffn_down_exps.weight")
    assert down["type"] == "CQ4" and down["shape"] == [4, 64, 64]
    assert down["bpw"] == pytest.approx(4 + 16 * 8 / 64 + 32 / 64 + 8 / 64)
    assert "CQ4" in run("info", folder / "moe.gguf").stdout


@pytest.mark.parametrize("name", SHAPES)
def test_synthetic_models_run_and_have_the_size_that_is_announced(tmp_path, name):
    """The same architectures with everything narrower."""
    shape = replace(SHAPES[name], hidden=128, heads=4, kv_heads=2, head_dim=64, ffn=192, vocab=320)
    write_synthetic(tmp_path / "m.gguf", shape, 2)
    assert 0 < (tmp_path / "m.gguf").stat().st_size - synthetic_bytes(shape, 2) < 20_000
    logits = load_model(tmp_path / "m.gguf", n_ctx=16, n_threads=1).forward(np.arange(9, dtype=np.int32), 0, 9)
    assert np.isfinite(logits).all() and logits.std() > 0


def test_bench_measures_both_tests_and_the_kernels(files):
    folder, _ = files
    results = run_json("bench", folder / "moe.gguf", "-p", 20, "-n", 5, "-r", 2, "-d", 3, "-o", "json")
    assert [result["test"] for result in results] == ["pp20 @ d3", "tg5 @ d3"]
    for result in results:
        assert len(result["samples_ts"]) == 2 and result["avg_ts"] == pytest.approx(np.mean(result["samples_ts"]))
        assert {"stddev_ts", "model_size", "model_n_params", "n_threads", "backend", "cpu_info"} <= set(result)
    cut = run_json("bench", folder / "types.gguf", "-p", 4, "-n", 0, "-r", 1, "--json")
    assert cut[0]["model_n_params"] == results[0]["model_n_params"]  # lists of experts are no parameters
    kernels = run_json("bench", folder / "moe.gguf", "--kernels", "--json")
    assert {"gemv", "gemm512"} == {result["kernel"] for result in kernels}
    for result in kernels:
        assert min(result["gbps"], result["frac_bandwidth"], result["frac_peak"]) > 0 and result["frac_peak"] < 1.5


@pytest.mark.parametrize("base", ["wider", "renamed", "directory"])
def test_a_base_of_another_vocabulary_is_refused_before_the_run(files, tmp_path, base):
    folder, _ = files
    if base == "directory":  # as many tokens, each byte with another id
        TinyModel("llama", {"vocab_size": MOE.vocab}).save(tmp_path / "base")
    renamed = KEYS | {"tokenizer.ggml.tokens": KEYS["tokenizer.ggml.tokens"][::-1]}
    other = {"wider": (replace(MOE, vocab=MOE.vocab + 32), KEYS), "renamed": (MOE, renamed)}
    if base in other:
        write_tiny(tmp_path / "base", *other[base])
        (tmp_path / "base").rename(tmp_path / "base.gguf")
    path = next(tmp_path.glob("base*"))
    done = run("perplexity", folder / "moe.gguf", "-f", folder / "text.txt", "-c", N_CTX, "--base", path)
    assert_refused(done, "--base has a", "vocabulary")
    assert "[1]" not in done.stderr


def test_bad_usage_and_bad_input(files, tmp_path):
    folder, _ = files
    model, text = folder / "moe.gguf", folder / "text.txt"
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert_refused(run("perplexity", model, "-f", text), "fewer than two chunks")
    assert_refused(run("perplexity", model, "-f", tmp_path / "none.txt"), "none.txt")
    assert_refused(run("perplexity", model, "-f", tmp_path / "binary.txt", "-c", 8), "binary.txt", "UTF-8")
    assert_refused(run("perplexity", model), "-f")
    assert_refused(run("perplexity", text, "-f", text, "-c", N_CTX), "text.txt", "not a GGUF file")
    assert_refused(run("perplexity", model, "-f", text, "-c", N_CTX, "--isa", "sse9"), "sse9")
    assert_refused(run("perplexity", model, "-f", text, "-c", N_CTX, "--base", tmp_path / "none"), "none")
    assert_refused(run("bench", model, "-r", 0), "-r")
    assert_refused(run("bench", model, "--cuda"), "--cuda")
    assert_refused(run("bench"), "FILE")
    assert_refused(run("bench", model, "--synthetic", "mixtral-8x7b"), "--synthetic")
    assert_refused(run("bench", model, "--layers", 2), "--layers")
    assert_refused(run("bench", "--synthetic", "phi-maxi-moe"), "phi-maxi-moe")
    assert_refused(run("bench", "--synthetic", "qwen3-30b-a3b", "--layers", 49), "49")
    assert_refused(run("info", tmp_path), str(tmp_path))
    assert_refused(run("export", model, "--out", "/nonexistent/x.gguf"), "/nonexistent")
    assert_refused(run("export", text, "--out", tmp_path / "x.gguf"), "not a GGUF file")
    assert not (tmp_path / "x.gguf").exists() and not list(Path(tmp_path).glob("*.part"))


@pytest.mark.parametrize("command", ["run", "perplexity", "bench", "export", "info", "convert"])
def test_version(command):
    module = "codequant_converter.cli" if command == "convert" else f"pyggml_bridge.cli.{command}"
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cq-{command} {package_version()}\n", "")


def test_interrupt_exits_with_130(files):
    folder, _ = files
    line = [sys.executable, "-m", "pyggml_bridge.cli.bench", str(folder / "moe.gguf"), "-n", "100000", "-p", "0"]
    with interruptible(line) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err

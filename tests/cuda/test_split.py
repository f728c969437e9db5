"""--gpu-layers: programs cut in two, on the CPU and on emulated kernels, with the logits of the CPU alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyggml_bridge.cli import bench, perplexity, run
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from pyggml_bridge.models.llama import build
from pyggml_bridge.operations import Attention, Embed, Recv, Send
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.split import RESERVED_BYTES, cut, on_cpu
from pyggml_bridge.weights import Weights
from tests.cuda.stand_in import StandIn, allocated_bytes
from tests.cuda.test_backend import MAX_MEAN_KLD, N_DECODE, N_PREFILL, compare_with_the_cpu
from tests.test_runner import mean_kld
from tests.tiny_architectures import TinyDeepSeek, TinyPhi
from tests.tiny_gguf import Tiny, write_tiny

N_LAYERS = 3
MODELS = {
    "dense": Tiny(n_layers=N_LAYERS),
    "moe": Tiny(n_layers=N_LAYERS, n_experts=6, hadamard=32, ffn=64, arch="qwen2moe", shared_ffn=64),
    "moe-types": Tiny(
        n_layers=N_LAYERS, n_experts=3, expert_cqs=(CQType.CQ4, CQType.CQ3T, CQType.CQ4), codebook_rows=8
    ),
}


@pytest.mark.parametrize("gpu_layers", [0, 1, N_LAYERS - 1, N_LAYERS, N_LAYERS + 5])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_layers_gives_the_cpus_logits(
    name: str, gpu_layers: int, tmp_path: Path, device: StandIn
) -> None:
    compare_with_the_cpu(tmp_path / "tiny.gguf", MODELS[name], gpu_layers)
    all_there = gpu_layers >= N_LAYERS
    # With work, a MoE has one segment up to each router whose experts are on the host, and the last; a dense model one.
    segments = 1 if all_there or name == "dense" else N_LAYERS - gpu_layers + 1
    assert device.graph_launches == N_DECODE * segments
    assert ("embed" in {launch.kernel for launch in device.executed}) == all_there


@pytest.mark.parametrize(
    ("t", "gpu_layers", "segments"),
    [
        (TinyDeepSeek(), 0, 3),
        (TinyDeepSeek(q_rank=64, n_experts=8, groups=(4, 2), scale=2.5, seed=4), 1, 2),
        (TinyDeepSeek(), 2, 1),  # the first layer is dense and on the GPU: the CPU has the embedding alone
        (TinyPhi(window=17, original=N_PREFILL + 2, seed=4), 0, 4),  # crosses the short factors' length
        (TinyPhi(n_layers=2, seed=1), 1, 2),
    ],
    ids=["deepseek2-0", "deepseek2-1", "deepseek2-2", "phimoe-0", "phimoe-1"],
)
def test_latent_attention_and_sparsemixer_give_the_cpus_logits(
    t: Tiny, gpu_layers: int, segments: int, tmp_path: Path, device: StandIn
) -> None:
    compare_with_the_cpu(tmp_path / "tiny.gguf", t, gpu_layers)
    assert device.graph_launches == N_DECODE * segments
    kernels = {launch.kernel for launch in device.executed}
    assert "embed" not in kernels
    assert ("latent_attention" in kernels) == isinstance(t, TinyDeepSeek)


def test_what_is_handed_over(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", MODELS["moe"])
    program = build(Weights(GGUFFile(tmp_path / "tiny.gguf")), 64)
    host, device = cut(program, on_cpu(program, 2))
    x, sends = program.ops[0].out, [type(op) for op in device.ops]
    assert [type(op) for op in host.ops[:2]] == [Embed, Send] and device.ops[0] == Recv(x)
    sent = [op.x for op in device.ops if isinstance(op, Send)]
    assert [value.width for value in sent] == [6, 128, 128] and sent[2] is x  # logits, their input, the residual
    assert [op.out for op in host.ops if isinstance(op, Recv)] == sent
    assert sends.count(Recv) == 2 and isinstance(host.ops[-1], Send) and host.ops[-1].x is x
    assert host.routings == program.routings[:1] and device.routings == program.routings[1:]
    assert host.logits is None and device.logits is program.logits
    kept = [op for partition in (host, device) for op in partition.ops if not isinstance(op, Send | Recv)]
    assert len(kept) == len(program.ops) and set(map(id, kept)) == set(map(id, program.ops))


def test_dense_layers_go_to_the_cpu_whole(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", MODELS["dense"])
    program = build(Weights(GGUFFile(tmp_path / "tiny.gguf")), 64)
    for gpu_layers in range(N_LAYERS):
        host, device = cut(program, on_cpu(program, gpu_layers))
        layers = [[op.layer for op in partition.ops if isinstance(op, Attention)] for partition in (host, device)]
        assert layers == [[*range(N_LAYERS - gpu_layers)], [*range(N_LAYERS - gpu_layers, N_LAYERS)]]
        handed = [type(op) for partition in (host, device) for op in partition.ops if isinstance(op, Send | Recv)]
        assert handed == [Send, Recv]


@pytest.mark.parametrize("t", [MODELS["moe"], Tiny(n_layers=N_LAYERS, tied=True)], ids=["moe", "tied"])
def test_long_prompts_run_in_batches_without_logits(t: Tiny, tmp_path: Path, device: StandIn) -> None:
    write_tiny(tmp_path / "tiny.gguf", t)
    tokens = np.arange(20, dtype=np.int32)
    logits = load_model(tmp_path / "tiny.gguf", cuda=True, gpu_layers=1, n_batch=8).forward(tokens, 0, 3)
    want = load_model(tmp_path / "tiny.gguf").forward(tokens, 0, 3)
    assert mean_kld(want, logits) <= MAX_MEAN_KLD
    assert np.abs(logits - want).max() <= 1e-4 * np.ptp(want)


@pytest.mark.parametrize("name", MODELS)
def test_memory_falls_with_the_layers_and_the_error_names_how_many_fit(
    name: str, tmp_path: Path, device: StandIn
) -> None:
    path, needed = tmp_path / "tiny.gguf", []
    write_tiny(path, MODELS[name])
    for gpu_layers in range(N_LAYERS + 1):
        device.allocated.clear()
        load_model(path, cuda=True, gpu_layers=gpu_layers, n_ctx=64)
        needed.append(allocated_bytes(device) + RESERVED_BYTES)
    assert needed == sorted(set(needed))
    device.allocated.clear(), device.uploads.clear()
    for gpu_layers in range(N_LAYERS):
        device.free_bytes = needed[gpu_layers + 1] - 1
        for asked in (None, N_LAYERS, gpu_layers + 1):
            with pytest.raises(CQError, match=f"GB free: try --gpu-layers {gpu_layers} or a smaller --ctx$"):
                load_model(path, cuda=True, gpu_layers=asked, n_ctx=64)
        assert not device.allocated and not device.uploads
    device.free_bytes = needed[0] - 1
    with pytest.raises(CQError, match=r"GB free: try a smaller --ctx$"):
        load_model(path, cuda=True, gpu_layers=0, n_ctx=64)
    device.free_bytes = needed[0]
    load_model(path, cuda=True, gpu_layers=0, n_ctx=64)


COMMANDS = {
    "cq-run": (run.main, ["m.gguf", "-p", "x"]),
    "cq-perplexity": (perplexity.main, ["m.gguf", "-f", "text"]),
    "cq-bench": (bench.main, ["m.gguf"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-layers", "4"], "--gpu-layers: only with --cuda"),
        (["--cuda", "--gpu-layers", "-1"], "--gpu-layers: -1 is below 0"),
        (["--cuda", "-ngl", "x"], "argument --gpu-layers/-ngl: invalid int value: 'x'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    command: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, others = COMMANDS[command]
    assert call(main, [command, *others, *arguments], monkeypatch) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", f"error: {message}\n")


def test_bench_names_the_backend(
    tmp_path: Path, device: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "tiny.gguf", MODELS["dense"])
    command = ["cq-bench", str(tmp_path / "tiny.gguf"), "-p", "6", "-n", "2", "-r", "1", "--json", "--cuda"]
    for arguments, name, layers in (
        ([], "CUDA (Stand-in)", 3),
        (["-ngl", "1"], "CUDA (Stand-in, 1 of 3 layers), CPU", 1),
    ):
        assert call(bench.main, [*command, *arguments], monkeypatch) == 0
        results = json.loads(capsys.readouterr().out)
        assert [result["test"] for result in results] == ["pp6", "tg2"]
        for result in results:
            assert result["backend"].startswith(name) and result["n_gpu_layers"] == layers


def call(main: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code

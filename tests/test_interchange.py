"""What cq-export and --rotated-only write for llama.cpp: the tensors and keys that its loader asks for, the logits."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from codequant_converter import cli
from codequant_converter.reference import load
from gguf import GGMLQuantizationType

from pyggml_bridge.errors import CQError
from pyggml_bridge.export import TYPES, export
from pyggml_bridge.models import load_model
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.stock import differences
from tests.models import MODELS, TEXT, VOCAB
from tests.test_converter_files import convert, divergence, relative_difference, where_routed_alike

TOKENS = np.arange(64, dtype=np.int32) * 37 % VOCAB
# One model for each architecture of llama.cpp's, in a form that it has, by what its loader demands.
LOADABLE = {
    "llama-tied": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3-wide-heads": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe-top-1": "qwen2moe",
    "olmoe-mha": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v2-tied": "deepseek2",
    "phimoe": "phimoe",
}
EXPERT_KEYS = {"expert_count", "expert_used_count"}
MLA_KEYS = {"kv_lora_rank", "q_lora_rank", "key_length_mla", "value_length_mla", "key_length", "value_length"}
KEYS = {
    "qwen3moe": EXPERT_KEYS | {"expert_feed_forward_length"},
    "qwen2moe": EXPERT_KEYS | {"expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "olmoe": EXPERT_KEYS,
    "phimoe": EXPERT_KEYS,
    "deepseek2": EXPERT_KEYS
    | {f"attention.{key}" for key in MLA_KEYS}
    | {"expert_feed_forward_length", "expert_shared_count", "expert_weights_scale", "leading_dense_block_count"},
}
COMMON_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every model on disk as <name>/, converted with default settings as <name>.cq.gguf."""
    folder = tmp_path_factory.mktemp("interchange")
    for name in LOADABLE:
        MODELS[name].save(folder / name)
        convert(folder / name, folder / f"{name}.cq.gguf", "--no-check")
    return folder


def attention_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """A layer's attention tensors below blk.N., in torch's order, as llama.cpp's loader has their dimensions."""
    config, arch = MODELS[name].config(), LOADABLE[name]
    hidden, heads = config.hidden_size, config.num_attention_heads
    if arch == "deepseek2":
        rank, rope, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
        low = config.q_lora_rank
        n_q = heads * (nope + rope)
        queries = {"attn_q_a": (low, hidden), "attn_q_a_norm": (low,), "attn_q_b": (n_q, low)}
        shapes = {
            **(queries if low else {"attn_q": (n_q, hidden)}),
            "attn_kv_a_norm": (rank,),
            "attn_kv_a_mqa": (rank + rope, hidden),
            "attn_k_b": (heads, rank, nope),
            "attn_v_b": (heads, config.v_head_dim, rank),
            "attn_output": (hidden, heads * config.v_head_dim),
        }
        return {f"{stem}.weight": shape for stem, shape in shapes.items()}
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    n_q, n_kv = heads * head_dim, config.num_key_value_heads * head_dim
    rows = {"q": n_q, "k": n_kv, "v": n_kv}
    shapes = {f"attn_{x}.weight": (n, hidden) for x, n in rows.items()}
    shapes["attn_output.weight"] = (hidden, n_q)
    if arch in ("qwen2", "qwen2moe", "phimoe"):
        shapes |= {f"attn_{x}.bias": (n,) for x, n in rows.items()}
    if arch == "phimoe":
        shapes |= dict.fromkeys(("attn_output.bias", "attn_norm.bias", "ffn_norm.bias"), (hidden,))
    if arch in ("qwen3", "qwen3moe"):
        shapes |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (head_dim,))
    if arch == "olmoe":
        shapes |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (hidden,))
    return shapes


def ffn_shapes(name: str, layer: int) -> dict[str, tuple[int, ...]]:
    """A layer's FFN tensors, likewise."""
    config = MODELS[name].config()
    hidden, width = config.hidden_size, config.intermediate_size
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    n = next((getattr(config, field) for field in counts if hasattr(config, field)), 0)
    if not n or layer < getattr(config, "first_k_dense_replace", 0):
        return {f"ffn_{x}.weight": (width, hidden) for x in ("gate", "up")} | {"ffn_down.weight": (hidden, width)}
    own = getattr(config, "moe_intermediate_size", width)
    shapes = {f"ffn_{x}_exps.weight": (n, own, hidden) for x in ("gate", "up")}
    shapes |= {"ffn_down_exps.weight": (n, hidden, own), "ffn_gate_inp.weight": (n, hidden)}
    shared = getattr(config, "shared_expert_intermediate_size", 0) or getattr(config, "n_shared_experts", 0) * own
    if shared:
        shapes |= {f"ffn_{x}_shexp.weight": (shared, hidden) for x in ("gate", "up")}
        shapes["ffn_down_shexp.weight"] = (hidden, shared)
    if hasattr(config, "shared_expert_intermediate_size"):
        shapes["ffn_gate_inp_shexp.weight"] = (1, hidden)
    return shapes


def demanded_shapes(name: str) -> dict[str, tuple[int, ...]]:
    config = MODELS[name].config()
    hidden, n_layers = config.hidden_size, config.num_hidden_layers
    shapes = dict.fromkeys(("token_embd.weight", "output.weight"), (config.vocab_size, hidden))
    shapes["output_norm.weight"] = (hidden,)
    if LOADABLE[name] == "phimoe":
        shapes |= {"output_norm.bias": (hidden,), "output.bias": (config.vocab_size,)}
    for layer in range(n_layers):
        norms = dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (hidden,))
        own = attention_shapes(name) | ffn_shapes(name, layer) | norms
        shapes |= {f"blk.{layer}.{stem}": shape for stem, shape in own.items()}
    return shapes


@pytest.mark.parametrize("name", LOADABLE)
def test_export_holds_what_llama_cpps_loader_demands(folder, name):
    """All tensors by name and shape, nothing else, types that it has; every key without a default."""
    out, arch = folder / f"{name}.f16.gguf", LOADABLE[name]
    export(folder / f"{name}.cq.gguf", out, GGMLQuantizationType.F16)
    reader = gguf.GGUFReader(out)
    found = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    wanted = demanded_shapes(name)
    if "ffn_gate_inp_shexp.weight" in str(wanted):  # one dimension or two, it takes both
        found = {key: shape[-1:] if "inp_shexp" in key else shape for key, shape in found.items()}
        wanted = {key: shape[-1:] if "inp_shexp" in key else shape for key, shape in wanted.items()}
    assert found == wanted
    assert {tensor.tensor_type for tensor in reader.tensors} <= set(TYPES.values())
    keys = {key.removeprefix(f"{arch}.") for key in reader.fields if key.startswith(f"{arch}.")}
    assert COMMON_KEYS | KEYS.get(arch, set()) <= keys
    assert not any(key.startswith("cq.") for key in reader.fields)
    assert reader.get_field("general.file_type").contents() == 1
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"  # as in tokenizer.json, whatever the model_type
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == VOCAB
    assert bool(differences(GGUFFile(out))) == (arch == "phimoe")


@pytest.mark.parametrize("name", LOADABLE)
def test_exported_weights_are_the_clustered_ones(folder, name):
    """Up to the 8 bits of the activations that the clustered types are multiplied with, and F16's rounding."""
    original = load_model(folder / f"{name}.cq.gguf", n_ctx=64, n_threads=2).forward(TOKENS, 0, 64).copy()
    for kind, bound in (("f32", 0.02), ("f16", 0.02), ("q8_0", 0.03)):
        export(folder / f"{name}.cq.gguf", folder / "m.gguf", TYPES[kind])
        exported = load_model(folder / "m.gguf", n_ctx=64, n_threads=2).forward(TOKENS, 0, 64)
        assert divergence(exported, original) < bound


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-tied", "f16"),
        ("llama-tied", "f32"),
        ("qwen2_moe-top-1", "f32"),
        ("deepseek_v2", "f32"),
        ("phimoe", "f32"),
    ],
)
def test_rotated_only_is_the_original_in_another_basis(folder, tmp_path, name, kind):
    """Floats only, nothing to compute at run time, other weights, the same logits."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "512")
    document = convert(folder / name, tmp_path / "m.gguf", "--rotated-only", kind, *options)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(demanded_shapes(name))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert set(types.values()) == {kind.upper(), "F32"} and types["output.weight"] == kind.upper()
    assert reader.get_field("cq.hadamard.ffn_down").contents() == 0
    assert reader.get_field("general.file_type").contents() == (1 if kind == "f16" else 0)
    assert document["check"]["kld"] < 1e-3
    reference = load(str(folder / name))
    ours, original = where_routed_alike(load_model(tmp_path / "m.gguf", n_ctx=64), reference, TOKENS)
    assert relative_difference(ours, original) <= (1e-3 if kind == "f32" else 2e-2)
    convert(folder / name, tmp_path / "plain.gguf", "--rotated-only", kind, "--no-rotation", "--no-check")
    embeddings = [load_embedding(tmp_path / file) for file in ("m.gguf", "plain.gguf")]
    assert np.abs(embeddings[0] - embeddings[1]).max() > 0.1


def load_embedding(path: Path) -> np.ndarray:
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    return np.array(tensor.data, np.float32)


@pytest.mark.parametrize("option", [("--bits", "4"), ("--tensor-type", ".=f16"), ("--method", "paper")])
def test_rotated_only_refuses_what_clusters(option):
    arguments = cli.parser().parse_args(["m", "--out", "o.gguf", "--rotated-only", "f16", *option])
    with pytest.raises(CQError, match="--rotated-only"):
        cli.settings_of(arguments)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2_moe", ["heads other than"]),
        ("qwen2_moe-tied", ["renormalize"]),
        ("olmoe", ["fewer KV heads"]),
        ("phimoe-window-wide-heads", ["heads other than", "SparseMixer", "sliding window"]),
        ("phimoe-longrope-long", ["SparseMixer", "one attention factor"]),
        ("deepseek_v2-q-lora-groups", ["expert groups", "attn_factor"]),
    ],
)
def test_what_llama_cpp_does_otherwise_is_said(tmp_path, monkeypatch, capsys, name, said):
    MODELS[name].save(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "m.gguf", "--rotated-only", "--no-check")
    capsys.readouterr()
    from pyggml_bridge.cli import export as command

    monkeypatch.setattr(sys, "argv", ["cq-export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "o.gguf")])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: llama.cpp")]
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))

"""Which files and tensors of a checkpoint count, as in transformers: order of files, prefixes, tied heads, names."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.reference import load
from codequant_converter.source.checkpoint import Checkpoint
from codequant_converter.source.open_checkpoint import open_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import LFS_POINTER, GGUFFile
from tests.models import VOCAB

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 4096\n"
TOKENS = np.arange(16, dtype=np.int32) * 37 % VOCAB


@pytest.fixture
def model(saved, tmp_path):
    """A copy of an untied model to change."""
    return Path(shutil.copytree(saved("qwen2"), tmp_path / "model"))


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def shard(model: Path, parts: list[dict[str, torch.Tensor]], keep: bool = False) -> None:
    """Write files of an index instead of model.safetensors, or beside it."""
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    for file, part in zip(names, parts, strict=True):
        write(model / file, part)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if not keep:
        (model / "model.safetensors").unlink()


def halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[: len(names) // 2], names[len(names) // 2 :])]


def set_fields(model: Path, **fields: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def assert_as_transformers(model: Path) -> None:
    """Every tensor that we read is the one in transformers' model."""
    checkpoint, theirs = Checkpoint(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert torch.equal(checkpoint.embedding(), theirs.get_parameter(EMBEDDING))
    assert torch.equal(checkpoint.head(), theirs.get_output_embeddings().weight)
    assert torch.equal(checkpoint.final_norm(), theirs.get_parameter(NORM))
    for i, layer in enumerate(theirs.get_decoder().layers):
        arch = checkpoint.arch_of(i)
        ours = checkpoint.layer(i)
        for expert in range(arch.n_experts(checkpoint.config)):
            for name, tensor in checkpoint.expert(i, expert).items():
                linear = next((linear for linear in arch.linears if linear.name == name), None)
                if linear is not None:
                    assert torch.equal(tensor, linear.rows_of(layer.get_parameter(linear.parameter))[expert])
        for spec in arch.specs:
            if spec.name in ours:
                parameter = layer.get_parameter(spec.parameter)
                assert torch.equal(ours[spec.name], spec.rows_of(parameter) if hasattr(spec, "rows_of") else parameter)


# ---- which files ----


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_model_safetensors_comes_before_an_old_index(model):
    shard(model, halves(changed(tensors_of(model))), keep=True)
    assert_as_transformers(model)


def test_an_index_whose_files_are_gone_does_not_count_beside_model_safetensors(model):
    shard(model, halves(changed(tensors_of(model))), keep=True)
    for file in model.glob("model-0*"):
        file.unlink()
    assert_as_transformers(model)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "zzz.safetensors", "._model.safetensors"])
def test_other_files_are_left_alone(model, name):
    if name.startswith("."):
        (model / name).write_bytes(b"\0\5\x16\7 what macOS leaves beside a file on foreign disks")
    else:
        write(model / name, changed(tensors_of(model)))
    assert_as_transformers(model)
    shard(model, halves(tensors_of(model)))
    assert_as_transformers(model)


def test_the_file_that_the_configuration_names_comes_first(model):
    write(model / "chosen.safetensors", changed(tensors_of(model)))
    set_fields(model, transformers_weights="chosen.safetensors")
    assert_as_transformers(model)


def test_links_may_lead_anywhere(model, tmp_path):
    shard(model, halves(tensors_of(model)))
    for file in list(model.glob("*.safetensors")):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert_as_transformers(model)


@pytest.mark.parametrize("place", ["../outside.safetensors", "sub/../../outside.safetensors", "{absolute}"])
def test_an_index_that_leads_out_of_the_directory_is_refused(model, tmp_path, place):
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    name = place.format(absolute=tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CQError, match=r"index\.json: names .*not inside the directory"):
        Checkpoint(model)


def test_a_tensor_in_two_files_is_an_error_that_names_both(model):
    first, second = halves(tensors_of(model))
    name = next(iter(first))
    shard(model, [first, second | {name: first[name] + 1}])
    both = rf"{re.escape(name)} is in model-00001-of-00002\.safetensors and model-00002-of-00002\.safetensors"
    with pytest.raises(CQError, match=both):
        Checkpoint(model)


@pytest.mark.parametrize(
    "index", ["[]", "null", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100000]
)
def test_an_index_that_is_none(model, index):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CQError, match=r"model\.safetensors\.index\.json: "):
        Checkpoint(model)


def test_what_is_there_instead_of_safetensors_is_named(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(CQError, match=r"neither model\.safetensors nor .*there is weights\.safetensors"):
        Checkpoint(model)
    (model / "pytorch_model.bin").touch()
    with pytest.raises(CQError, match=r"pytorch_model\.bin: weights in PyTorch's format"):
        Checkpoint(model)
    with pytest.raises(CQError, match="give the directory"):
        open_checkpoint(str(model / "weights.safetensors"))


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"],
)
def test_git_lfs_pointers_are_called_that(model, name):
    (model / name).write_bytes(POINTER)
    with pytest.raises(CQError, match=rf"{re.escape(name)}: a Git LFS pointer"):
        Checkpoint(model)


def test_git_lfs_pointers_of_an_index(model):
    shard(model, halves(tensors_of(model)))
    (model / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    with pytest.raises(CQError, match=r"model-00002-of-00002\.safetensors: a Git LFS pointer"):
        Checkpoint(model)


# ---- names of tensors ----


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "deepseek_v2", "phimoe"])
@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_prefixes_as_in_transformers(saved, tmp_path, name, prefix):
    model = Path(shutil.copytree(saved(name), tmp_path / "model"))

    def spelled(key: str) -> str:
        is_inside = key.startswith("model.")
        return prefix + key.removeprefix("model.") if is_inside else prefix.removeprefix("model.") + key

    write(model / "model.safetensors", {spelled(key): tensor for key, tensor in tensors_of(model).items()})
    assert_as_transformers(model)


def test_two_spellings_of_a_tensor_are_an_error_that_names_both(model):
    write(model / "model.safetensors", tensors_of(model) | {"norm.weight": tensors_of(model)[NORM] + 1})
    with pytest.raises(CQError, match=r"model\.norm\.weight and norm\.weight"):
        Checkpoint(model)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_tensors_that_the_configuration_leaves_out_are_named(saved, model, capsys, prefix):
    found = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors_of(model).items()}
    found |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    write(model / "model.safetensors", found)
    Checkpoint(model)
    Checkpoint(saved("mixtral"))
    Checkpoint(saved("llama-tied"))
    assert capsys.readouterr().err == ""
    set_fields(model, num_hidden_layers=2, layer_types=None)
    write(model / "model.safetensors", found | {f"{prefix}layers.0.o_proj.bias": torch.ones(96)})
    Checkpoint(model)
    warning = capsys.readouterr().err
    assert "13 tensors are not in a model of this configuration" in warning
    assert warning.count("warning") == 1 and "o_proj.bias" in warning


def test_types_may_be_mixed(model):
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found = tensors_of(model)
    write(model / "model.safetensors", {name: t.to(types[i % 4]) for i, (name, t) in enumerate(found.items())})
    assert_as_transformers(model)


def test_a_tensor_without_elements_is_refused(model):
    write(model / "model.safetensors", tensors_of(model) | {NORM: torch.zeros(0)})
    with pytest.raises(CQError, match=r"model\.norm\.weight has shape \[0\]"):
        Checkpoint(model)


# ---- tied heads ----


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(saved, tmp_path, name, capsys):
    model = Path(shutil.copytree(saved(name), tmp_path / "model"))
    set_fields(model, tie_word_embeddings=True)
    assert_as_transformers(model)
    assert "lm_head.weight is not the embedding" in capsys.readouterr().err
    expected = AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32)
    with torch.no_grad():
        logits = expected(input_ids=torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].numpy()
    assert np.array_equal(load(str(model)).logits(TOKENS), logits)


def test_one_value_makes_a_head_of_its_own(model):
    found = tensors_of(model)
    found[HEAD] = found[EMBEDDING].clone()
    found[HEAD][-1, -1] += 1
    write(model / "model.safetensors", found)
    set_fields(model, tie_word_embeddings=True)
    assert_as_transformers(model)


def test_a_head_that_equals_the_embedding_is_tied_without_a_word(model, capsys):
    write(model / "model.safetensors", tensors_of(model) | {HEAD: tensors_of(model)[EMBEDDING].clone()})
    set_fields(model, tie_word_embeddings=True)
    assert Checkpoint(model).tied
    assert capsys.readouterr().err == ""


def test_the_embedding_may_be_stored_as_the_head(model):
    found = tensors_of(model)
    del found[EMBEDDING]
    write(model / "model.safetensors", found)
    set_fields(model, tie_word_embeddings=True)
    assert_as_transformers(model)


def test_no_head_where_it_is_not_tied_is_an_error(model):
    found = tensors_of(model)
    del found[HEAD]
    write(model / "model.safetensors", found)
    with pytest.raises(CQError, match=r"lm_head\.weight is missing, and tie_word_embeddings is false"):
        Checkpoint(model)


# ---- general.name ----


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("v0.1", "v0.1"),
        ("hub/models--org--Some-Model-7.5B/snapshots/0123abcd", "Some-Model-7.5B"),
        ("hub/models--gpt2/snapshots/0123abcd", "gpt2"),
        ("snapshots/0123abcd", "0123abcd"),
    ],
)
def test_a_directory_gives_its_name(saved, tmp_path, monkeypatch, path, name):
    model = Path(shutil.copytree(saved("qwen2"), tmp_path / path))
    assert open_checkpoint(str(model)).name == name
    monkeypatch.chdir(model)
    assert open_checkpoint(".").name == name
    assert open_checkpoint(f"../{model.name}").name == name
    monkeypatch.chdir(model.parent)
    assert open_checkpoint(f"./{model.name}/").name == name


def test_a_link_to_a_directory_has_its_own_name(saved, tmp_path):
    (tmp_path / "mine-2.5").symlink_to(saved("qwen2"), target_is_directory=True)
    assert open_checkpoint(os.fspath(tmp_path / "mine-2.5")).name == "mine-2.5"


def test_general_name_of_the_output(saved, tmp_path):
    model, out = Path(shutil.copytree(saved("qwen2"), tmp_path / "SmolLM2-1.7B")), tmp_path / "out.gguf"
    options = ("--rotated-only", "f32", "--no-check")
    cli.convert(cli.settings_of(cli.parser().parse_args([str(model), "--out", str(out), *options])))
    assert GGUFFile(out).get("general.name", str) == "SmolLM2-1.7B"

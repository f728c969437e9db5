"""A directory of safetensors, read lazily: configuration, tokenizer, and float32 weights of one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Keys

from ..console import warn
from . import arch
from .architecture import Architecture, Layer, Linear, Norm, Vector
from .config_fields import check_fields, check_generation, check_relations
from .source_tokenizer import SourceTokenizer, read_tokenizer
from .weight_files import SafetensorsSource, Source, read_json, refuse_pointers

transformers_logging.set_verbosity_error()  # what matters to the user is said by this package, in one line
transformers_logging.disable_progress_bar()

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EMBEDDING, FINAL_NORM, HEAD = GGUF_NAMES
BUFFERS = ("rotary_emb.inv_freq",)  # stored by old versions of transformers, computed from the configuration
FINAL_NORM_BIAS, HEAD_BIAS = "model.norm.bias", "lm_head.bias"
GGUF_BIASES = {FINAL_NORM_BIAS: "output_norm.bias", HEAD_BIAS: "output.bias"}


class Checkpoint:
    """A directory with config.json and safetensors files.

    config is transformers' configuration; arch the Architecture; every weight comes as float32, checked for its shape
    and for NaN and infinity (CQError naming the tensor).
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration and the names and shapes of all tensors; CQError for anything that does not fit."""
        self.path = path
        self.config = self._read_config()
        self.arch = self._find_architecture()
        check_fields(self.config.to_dict(), self.arch, str(self.path))
        check_relations(self.config, self.arch, str(self.path))
        self.arch.check(self.config)
        self.source = self._open_source()
        self.config.tie_word_embeddings = self.tied = self._is_tied()
        self._validate()

    @property
    def files(self) -> list[Path]:
        """Everything that is read of it."""
        names = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model")
        return [*self.source.files, *(file for name in names for file in sorted(self.path.glob(name)))]

    # ---- what a GGUF file does differently (gguf_checkpoint.py) ----

    def _read_config(self) -> Any:
        file = self.path / "config.json"
        if not file.is_file():
            raise CQError(f"{self.path}: not a model directory (no config.json)")
        refuse_pointers(self.path)
        raw = read_json(file)
        check_fields(raw, arch.find(str(raw.get("model_type"))), str(file))
        if raw.get("quantization_config"):
            raise CQError(f"{file}: quantization_config is set: only float checkpoints can be converted")
        return self._transformers_config(self.path)

    def _open_source(self) -> Source:
        return SafetensorsSource(self.path, getattr(self.config, "transformers_weights", None))

    @property
    def name(self) -> str:
        """What the model is called: the directory's name, or the repository's of a snapshot in the hub's cache."""
        # Not resolved where that is not needed: a link's own name is the user's choice.
        path = self.path.resolve() if ".." in self.path.parts else self.path.absolute()
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.rpartition("--")[2]
        return path.name or "model"

    def _load_arguments(self) -> tuple[str, dict[str, str]]:
        """Arguments of transformers' from_pretrained."""
        return str(self.path), {}

    def _disk_name(self, spec: Norm | Vector | Linear, layer: int) -> str:
        name = f"model.layers.{layer}.{spec.parameter}"
        if isinstance(spec, Linear) and spec.on_disk and self.source.shape(name) is None:
            return f"model.layers.{layer}.{spec.on_disk}"
        return name

    def _disk_shape(self, spec: Norm | Vector | Linear, layer: int) -> tuple[int, ...]:
        """Shape of the tensor on disk that holds this one, not of one expert's."""
        return tuple(self._parameter(spec, layer).shape)

    def _model_name(self, name: str) -> str:
        """Name on disk of a tensor that belongs to no layer."""
        return name

    def _from_disk(self, spec: Norm | Vector | Linear, tensor: Tensor) -> Tensor:
        """Undo what the file's conventions changed; tensor is the whole parameter."""
        return spec.rows_of(tensor) if isinstance(spec, Linear) else tensor

    def stored_tokenizer_keys(self) -> Keys:
        """The file's own tokenizer.ggml keys; a directory has none."""
        return {}

    # ---- the rest is common ----

    def _transformers_config(self, *path: object, **options: object) -> Any:
        try:
            return AutoConfig.from_pretrained(*path, **options)
        except Exception as error:  # transformers validates with many exception types
            raise CQError(f"{self.path}: invalid configuration: {error}") from error

    def _find_architecture(self) -> Architecture:
        return arch.find(self.config.model_type)

    @cached_property
    def skeleton(self) -> torch.nn.Module:
        """transformers' model on the meta device: shapes without weights, of every vector that there may be."""
        config = copy.deepcopy(self.config)
        for vector in self.arch.vectors:
            if vector.switch:
                setattr(config, vector.switch, True)
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # transformers raises many exception types here
            raise CQError(f"{self.path}: transformers builds no model of this configuration: {error}") from error

    def arch_of(self, layer: int) -> Architecture:
        """The description of one layer."""
        return self.arch.at(self.config, layer)

    def expected_shape(self, spec: Norm | Vector | Linear, layer: int) -> tuple[int, ...]:
        """Shape of a layer's tensor according to the configuration."""
        parameter = self._parameter(spec, layer)
        return tuple((spec.rows_of(parameter) if isinstance(spec, Linear) else parameter).shape)

    def _parameter(self, spec: Norm | Vector | Linear, layer: int) -> Tensor:
        parameter: Tensor = self.skeleton.get_decoder().layers[layer].get_parameter(spec.parameter)
        return parameter

    def _is_tied(self) -> bool:
        """Whether the head is the embedding.

        A head of its own in the checkpoint counts, whatever the configuration says, as with transformers 5 (version 4
        replaces it by the embedding). Without one and without tie_word_embeddings transformers draws a random head;
        here the head is missing then.
        """
        embedding, head = self._model_name(EMBEDDING), self._model_name(HEAD)
        if not self.config.tie_word_embeddings or None in (self.source.shape(head), self.source.shape(embedding)):
            return bool(self.config.tie_word_embeddings)
        if self.source.are_equal(embedding, head):
            return True
        warn(f"{self.path}: {head} is not the embedding, though tie_word_embeddings is true: it is kept as it is")
        return False

    def _layer_tensors(self) -> Iterator[tuple[Norm | Vector | Linear, int, str]]:
        """Every layer's tensors: description, layer, name on disk (experts one by one); CQError at a missing one.

        Not from the skeleton, whose layers and experts are as many as the configuration claims.
        """
        n_experts = self.arch.n_experts(self.config)
        for layer in range(self.config.num_hidden_layers):
            for spec in self.arch_of(layer).specs:
                name = self._disk_name(spec, layer)
                for each in (name.format(i) for i in range(n_experts if "{}" in name else 1)):
                    if self._is_absent(spec):
                        continue
                    if self.source.shape(each) is None:
                        raise CQError(f"{self.path}: tensor {each} is missing")
                    yield spec, layer, each

    def _validate(self) -> None:
        """Every tensor is present with the configuration's shape; a warning if there are others."""
        names = {self._model_name(name) for name in (EMBEDDING, FINAL_NORM, HEAD)}
        for spec, layer, name in list(self._layer_tensors()):
            is_expert = "{}" in self._disk_name(spec, layer)
            self._require(name, self.expected_shape(spec, layer)[1:] if is_expert else self._disk_shape(spec, layer))
            names.add(name)
        expected = {HEAD: not self.tied, FINAL_NORM_BIAS: self.arch.has_layer_norms, HEAD_BIAS: self.has_head_bias}
        for name in (EMBEDDING, FINAL_NORM, *(name for name, there in expected.items() if there)):
            self._require(self._on_disk(name), tuple(self.skeleton.get_parameter(name).shape))
            names.add(self._on_disk(name))
        if others := [name for name in self.source.others(names) if not name.endswith(BUFFERS)]:
            shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            warn(f"{self.path}: {len(others)} tensors are not in a model of this configuration, so left out: {shown}")

    def _is_absent(self, spec: Norm | Vector | Linear) -> bool:
        """Whether the configuration leaves this vector out."""
        return isinstance(spec, Vector) and spec.switch is not None and not getattr(self.config, spec.switch)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.source.shape(name)
        if found is None:
            why = ", and tie_word_embeddings is false" if name == self._model_name(HEAD) else ""
            raise CQError(f"{self.path}: tensor {name} is missing{why}")
        if found != shape:
            raise CQError(f"{self.path}: tensor {name} has shape {list(found)}, the configuration says {list(shape)}")

    def _read(self, name: str, entry: int | None = None) -> Tensor:
        tensor = self.source.read(name, entry)
        if not torch.isfinite(tensor).all():
            raise CQError(f"{self.path}: tensor {name} holds NaN or infinite values")
        return tensor

    def _on_disk(self, name: str) -> str:
        """Name on disk of a tensor that belongs to no layer; a tied embedding may be there as the head only."""
        stored = self._model_name(name)
        return self._model_name(HEAD) if name == EMBEDDING and self.tied and not self.source.shape(stored) else stored

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._read(self._on_disk(EMBEDDING))

    def final_norm(self) -> Tensor:
        """[hidden]."""
        return self._read(self._model_name(FINAL_NORM))

    @property
    def has_head_bias(self) -> bool:
        """Whether the checkpoint holds one."""
        return self.arch.head_bias is not None and bool(getattr(self.config, self.arch.head_bias))

    def final_norm_bias(self) -> Tensor:
        """[hidden], of a LayerNorm."""
        return self._read(self._model_name(FINAL_NORM_BIAS))

    def head_bias(self) -> Tensor:
        """[vocab]; zero where the configuration has none."""
        return self._read(self._model_name(HEAD_BIAS)) if self.has_head_bias else torch.zeros(self.config.vocab_size)

    def head(self) -> Tensor:
        """[vocab, hidden]; the embedding where they are tied."""
        return self.embedding() if self.tied else self._read(self._model_name(HEAD))

    def layer(self, index: int) -> Layer:
        """All tensors of one decoder layer but the experts'."""
        specs = [spec for spec in self.arch_of(index).specs if not _is_experts(spec)]
        return {spec.name: self._read_layer_tensor(spec, index) for spec in specs}

    def expert(self, index: int, expert: int) -> Layer:
        """The linears [out, in] of one expert of a layer, and the layer's norms."""
        arch = self.arch_of(index)
        norms: list[Norm | Vector] = [*arch.norms, *arch.norm_biases]
        found = {spec.name: self._read_layer_tensor(spec, index) for spec in norms}
        for linear in arch.linears:
            if linear.experts:
                name = self._disk_name(linear, index)
                whole = "{}" not in name  # on disk one tensor for all experts
                tensor = self._read(name, expert) if whole else self._read(name.format(expert))
                found[linear.name] = linear.rows_of(tensor) if whole else tensor
        return found

    def _read_layer_tensor(self, spec: Norm | Vector | Linear, layer: int) -> Tensor:
        if self._is_absent(spec):
            return torch.zeros(self.expected_shape(spec, layer))
        return self._from_disk(spec, self._read(self._disk_name(spec, layer)))

    @cached_property
    def tokenizer(self) -> SourceTokenizer:
        """As the files describe it; CQError if the checkpoint has none."""
        return read_tokenizer(self.path, self.config.vocab_size)

    @property
    def has_generation_config(self) -> bool:
        """Whether there is a file of it."""
        return (self.path / "generation_config.json").is_file()

    def token_texts(self, ids: list[int]) -> list[str] | None:
        """The vocabulary's texts of token ids, None where there is no tokenizer or an id has no text."""
        try:
            texts = [self.tokenizer.backend.id_to_token(token) for token in ids]
        except CQError:
            return None
        return None if None in texts else [str(text) for text in texts]

    @cached_property
    def generation_config(self) -> Any:
        """transformers' generation configuration; derived from the model's where there is no file."""
        file = self.path / "generation_config.json"
        if self.has_generation_config:
            check_generation(read_json(file), str(file))
            try:
                return GenerationConfig.from_pretrained(self.path)
            except Exception as error:  # transformers validates with many exception types
                raise CQError(f"{file}: invalid: {' '.join(str(error).split())}") from error
        return GenerationConfig.from_model_config(self.config)

    def model(self) -> torch.nn.Module:
        """The original in float32 through transformers, whole in memory."""
        path, options = self._load_arguments()
        load = AutoModelForCausalLM.from_pretrained
        model = load(path, config=self.config, dtype=torch.float32, **options).eval()
        self.arch.correct_rope(model.get_decoder().rotary_emb)
        return model


def _is_experts(spec: Norm | Vector | Linear) -> bool:
    return isinstance(spec, Linear) and spec.experts

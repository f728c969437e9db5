"""A GGUF file as a checkpoint: llama.cpp's names and row order, one tensor for all experts."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key, Keys, is_known

from ..console import warn
from . import arch
from .architecture import Linear, Norm, Vector, split_rope
from .checkpoint import GGUF_NAMES, Checkpoint
from .config_fields import check_gguf_keys
from .source_tokenizer import SourceTokenizer, tokenizer_of_gguf
from .weight_files import GgufSource, Source


class GgufCheckpoint(Checkpoint):
    """A GGUF file that transformers can dequantize."""

    source: GgufSource

    def __init__(self, path: Path) -> None:
        """Read the metadata; CQError for anything that does not fit."""
        self.source = GgufSource(path)
        super().__init__(path)

    def _read_config(self) -> Any:
        name = str(self.source.value("general.architecture") or "none")
        if name not in {arch.find(each).gguf_name for each in arch.supported() if arch.find(each).gguf_input}:
            raise CQError(f"{self.path}: architecture '{name}' is not supported as GGUF input")
        off = (None, 0, 1, "none")  # values that mean the same as no such key
        for key, what, harmless in (
            (f"{name}.expert_count", "experts", off[:2]),
            (f"{name}.attention.sliding_window", "a sliding window", off[:2]),
            (f"{name}.rope.scaling.type", "rope scaling", off),
            (f"{name}.rope.scaling.factor", "rope scaling", off),
            (f"{name}.rope.scale_linear", "rope scaling", off),
        ):
            if self.source.value(key) not in harmless:
                raise CQError(f"{self.path}: a GGUF file with {what} ({key}) is not supported as input")
        if self.source.value(Key.CQ_HADAMARD_FFN_DOWN):
            raise CQError(f"{self.path}: was written by cq-convert for a transform at run time: use its original")
        if self.source.shape("rope_freqs.weight"):
            raise CQError(f"{self.path}: a GGUF file with rope scaling (rope_freqs.weight) is not supported as input")
        check_gguf_keys(self.source.value, name, str(self.path))
        config = self._transformers_config(self.path.parent, gguf_file=self.path.name)
        config.sliding_window = None  # transformers gives one to whatever has "mistral" in its name
        return config

    def _open_source(self) -> Source:
        return self.source

    @property
    def name(self) -> str:
        """The file's own general.name, or its file name."""
        stored = self.source.value("general.name")
        return stored if isinstance(stored, str) and stored.strip() else re.sub(r"(?i)\.gguf$", "", self.path.name)

    def _load_arguments(self) -> tuple[str, dict[str, str]]:
        return str(self.path.parent), {"gguf_file": self.path.name}

    def _disk_name(self, spec: Norm | Vector | Linear, layer: int) -> str:
        return spec.in_file(layer)

    def _disk_shape(self, spec: Norm | Vector | Linear, layer: int) -> tuple[int, ...]:
        return self.expected_shape(spec, layer)

    def _model_name(self, name: str) -> str:
        return GGUF_NAMES[name]

    def _from_disk(self, spec: Norm | Vector | Linear, tensor: Tensor) -> Tensor:
        if isinstance(spec, Linear) and spec.rope_heads:
            return split_rope(tensor, getattr(self.config, spec.rope_heads))
        return tensor

    def token_texts(self, ids: list[int]) -> list[str] | None:
        """Texts of token ids in the file's own list, None where it has none or a shorter one."""
        tokens = self.source.value("tokenizer.ggml.tokens")
        return [tokens[i] for i in ids] if tokens and max(ids) < len(tokens) else None

    def stored_tokenizer_keys(self) -> Keys:
        """The file's own tokenizer.ggml keys, which its author's tokenizer determined; a warning for unknown ones."""
        found = {name: field for name, field in self.source.reader.fields.items() if name.startswith("tokenizer.ggml.")}
        unknown = [name for name in found if not is_known(name)]
        if unknown:
            warn(f"{self.path}: keys that this program does not know are left out: {', '.join(unknown)}")
        stored = self.source.reader.get_field(Key.TOKENIZER_JSON)
        keys = {name: field.contents() for name, field in found.items() if name not in unknown}
        return keys | ({Key.TOKENIZER_JSON: stored.contents()} if stored else {})

    @cached_property
    def tokenizer(self) -> SourceTokenizer:
        """As the runner reads the file's keys; CQError if they describe none."""
        fields = self.source.reader.fields.items()
        keys = {name: field.contents() for name, field in fields if name.startswith("tokenizer.")}
        return tokenizer_of_gguf(self.path, keys)

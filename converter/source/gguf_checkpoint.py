"""A GGUF file as a checkpoint: llama.cpp's names and row order, one tensor for all experts."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key, is_known

from ..console import warn
from . import arch
from .architecture import Keys, Linear, Norm, Vector, split_rope
from .checkpoint import GGUF_NAMES, Checkpoint
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
        field = self.source.reader.get_field("general.architecture")
        name = str(field.contents()) if field else "none"
        if name not in {arch.find(each).gguf_name for each in arch.supported() if arch.find(each).gguf_input}:
            raise CQError(f"{self.path}: architecture '{name}' is not supported as GGUF input")
        for key, what in ((f"{name}.expert_count", "experts"), (f"{name}.rope.scaling.type", "rope scaling")):
            if self.source.reader.get_field(key):
                raise CQError(f"{self.path}: a GGUF file with {what} ({key}) is not supported as input")
        hadamard = self.source.reader.get_field(Key.CQ_HADAMARD_FFN_DOWN)
        if hadamard and hadamard.contents():
            raise CQError(f"{self.path}: was written by cq-convert for a transform at run time: use its original")
        if self.source.shape("rope_freqs.weight"):
            raise CQError(f"{self.path}: a GGUF file with rope scaling (rope_freqs.weight) is not supported as input")
        return self._transformers_config(self.path.parent, gguf_file=self.path.name)

    def _open_source(self) -> Source:
        return self.source

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

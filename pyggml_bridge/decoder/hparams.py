"""A model's dimensions from llama.cpp's metadata keys, checked for consistency before anything is sized by them."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml_bridge.errors import CQError
from pyggml_bridge.weights import Weights

MAX_HEAD_DIM = 1024  # native/src/kernels.h
MAX_DIMENSION = 1 << 24


@dataclass(frozen=True)
class HParams:
    """Dimensions shared by the decoder-only architectures.

    n_experts and top_k are 0 for dense models, shared_ffn_width where no expert is shared by all tokens.
    expert_groups and expert_scale: as Program.route has them.
    """

    arch: str
    vocab_size: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    n_rot: int
    ffn_width: int
    expert_ffn_width: int
    shared_ffn_width: int
    n_experts: int
    top_k: int
    eps: float
    expert_groups: tuple[int, int] = (1, 0)
    expert_scale: float = 1.0

    @classmethod
    def read(cls, weights: Weights) -> HParams:
        """Read `<arch>.*`; CQError naming the key that is missing or impossible."""
        file = weights.file
        arch: str = file.get("general.architecture", str)

        def dimension(key: str, default: int | None = None) -> int:
            value: int = file.get(f"{arch}.{key}", int, ... if default is None else default)
            if not 0 <= value <= MAX_DIMENSION:
                raise CQError(f"{file.path}: the key {arch}.{key} is {value}")
            return value

        hidden, n_heads = dimension("embedding_length"), dimension("attention.head_count")
        head_dim = dimension("attention.key_length", hidden // n_heads if n_heads else 0)
        h = cls(
            arch=arch,
            vocab_size=vocab_size(weights),
            hidden=hidden,
            n_layers=dimension("block_count"),
            n_heads=n_heads,
            n_kv_heads=dimension("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            value_dim=dimension("attention.value_length", head_dim),
            n_rot=dimension("rope.dimension_count", head_dim),
            ffn_width=dimension("feed_forward_length"),
            expert_ffn_width=dimension("expert_feed_forward_length", dimension("feed_forward_length")),
            shared_ffn_width=dimension("expert_shared_feed_forward_length", 0),
            n_experts=dimension("expert_count", 0),
            top_k=dimension("expert_used_count", 0),
            eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        )
        h._check(str(file.path))
        return h

    def _check(self, path: str) -> None:
        for name in (
            "hidden",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "n_rot",
            "ffn_width",
            "expert_ffn_width",
        ):
            if getattr(self, name) < 1:
                raise CQError(f"{path}: {name} is {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads or self.head_dim > MAX_HEAD_DIM:
            raise CQError(f"{path}: {self.n_heads} heads over {self.n_kv_heads} KV heads of width {self.head_dim}")
        if self.n_experts and not 1 <= self.top_k <= self.n_experts:
            raise CQError(f"{path}: {self.top_k} of {self.n_experts} experts per token")
        if self.eps < 0:
            raise CQError(f"{path}: layer_norm_rms_epsilon is {self.eps}")


def vocab_size(weights: Weights) -> int:
    """Rows of the token embedding."""
    tensor = weights.file.tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise CQError(f"{weights.file.path}: tensor token_embd.weight is missing or not a matrix")
    return tensor.shape[0]

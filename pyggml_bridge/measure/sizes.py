"""Bits per weight, counted the same way everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml_bridge.format import EMBEDDINGS_AND_HEAD, Companions
from pyggml_bridge.reader import GGUFFile, Tensor


@dataclass(frozen=True)
class TensorSize:
    """A weight with its companions. nbytes counts all of them, n_weights only the weight's elements."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    n_weights: int

    @property
    def bpw(self) -> float:
        """Bits per weight, companions included."""
        return 8 * self.nbytes / self.n_weights


def tensor_sizes(file: GGUFFile) -> list[TensorSize]:
    """Every tensor of the file in file order, companions counted with their weight."""
    beside: dict[str, list[Tensor]] = {}
    for name in file.tensors:
        if name.endswith(".weight"):
            candidates = vars(Companions.of(name)).values()
            beside[name] = [file.tensors[c] for c in candidates if c in file.tensors]
    companions = {tensor.name for tensors in beside.values() for tensor in tensors}
    return [
        TensorSize(name, t.type.name, t.shape, t.nbytes + sum(s.nbytes for s in beside.get(name, [])), t.n_elements)
        for name, t in file.tensors.items()
        if name not in companions
    ]


def bits_per_weight(file: GGUFFile) -> tuple[float, float]:
    """(bpw, bpw_total): bytes of all tensors but embeddings and head over their weights; of the whole file over all."""
    sizes = tensor_sizes(file)
    body = [size for size in sizes if size.name not in EMBEDDINGS_AND_HEAD]
    n_body, n_all = sum(size.n_weights for size in body), sum(size.n_weights for size in sizes)
    bpw = 8 * sum(size.nbytes for size in body) / n_body if n_body else 0.0
    return bpw, 8 * file.size / n_all if n_all else 0.0

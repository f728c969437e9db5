"""The published method as the converter's stages see it: a tuner of every layer, its memory, its state on disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...calibrate.layer_stream import LayerStream
from ...results import Tuned
from ...resume.work_folder import WorkFolder
from ...settings import Settings
from ...transform.transformed_model import TransformedModel
from ...transform.weight_layout import layout_of
from ..experts import FittedExperts
from ..fitting import FittedWeight
from ..tuner import Fitted, Stored, Tuner
from .centroid_tuning import CentroidTuner, Codebooks
from .layer_pair import LayerPair

# Bytes per weight of a layer that tuning all of its experts together holds: originals, module, indices, gradients.
BYTES_PER_WEIGHT = 40


@dataclass(frozen=True)
class PaperTuner:
    """Gives the centroid tuner each layer's codebooks, and the original layer to compare them with."""

    model: TransformedModel
    stream: LayerStream
    n_threads: int
    centroids: CentroidTuner

    def tune(self, index: int, weights: dict[str, Fitted | Stored], hidden: Tensor) -> Tuned:
        """Fine-tune the fits of all measured linears; the original's hidden states advance behind the layer."""
        arch, config = self.model.checkpoint.arch_of(index), self.model.checkpoint.config
        books, fixed = [], {}
        for linear in arch.linears:
            weight, layout = weights[linear.name], layout_of(linear, config, hadamard=0)  # published without one
            if linear.measured and isinstance(weight, FittedWeight | FittedExperts):
                books.append(Codebooks(linear, weight, layout))
            else:
                fixed[linear.name] = layout.from_file(weight.weight(self.n_threads))
        module = self.stream.module(index, self.model.whole_layer(index))
        return self.centroids.tune(LayerPair(self.stream, arch, module, fixed), books, hidden)

    def load(self, work: WorkFolder, n_layers: int) -> None:
        """Go on with the original's hidden states behind so many layers."""
        if n_layers:
            self.centroids.hidden = work.load(_name(n_layers))

    def save(self, work: WorkFolder, n_layers: int) -> None:
        """Keep the original's hidden states behind so many layers, beside those behind one layer less."""
        work.remove(_name(n_layers - 2))
        work.save(_name(n_layers), self.centroids.hidden)


def tuner_for(settings: Settings, model: TransformedModel, stream: LayerStream, tokens: Tensor) -> Tuner | None:
    """A conversion's, calibrated on tokens [sequences, n]; None if codebooks stay as clustering leaves them."""
    if not settings.tunes_centroids:
        return None
    centroids = CentroidTuner(model.embedding()[tokens], settings.router_weight, settings.seed)
    return PaperTuner(model, stream, settings.threads, centroids)


def tuning_bytes_per_weight(settings: Settings) -> int:
    """Memory beside the clustering, for the estimate: per weight of a whole layer."""
    return BYTES_PER_WEIGHT if settings.tunes_centroids else 0


def _name(n_layers: int) -> str:
    return f"tuner-{n_layers}"

"""Stage 3 as published, adaptive clustering with centroid fine-tuning (ACCF), one decoder layer at a time.

It starts from the k-means' codebooks and repeats two steps. First, gradient steps on the centroids, with fixed
assignments (a centroid's gradient is the sum over its members), lower the layer's loss: the relative squared errors of
what attention and FFN (or the experts' weighted sum) write, plus lambda times the divergence of the router's choice
from the original's. Second, each weight takes the centroid c with the least (D1_jj c - D2_jj w_ij)^2, where
D1 = diag(X~^T X~) and D2 = diag(X~^T X), X being the inputs in the original model and X~ those in the quantized one.
The paper also clusters the router; here the router stays as it is, so lambda acts on what the router reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...results import Tuned
from ...source.architecture import Linear
from ...transform.weight_layout import WeightLayout
from ..experts import FittedExperts
from ..fitting import FittedWeight
from .layer_pair import ATTENTION, FFN, ROUTER, LayerPair

ROUNDS = 2
STEPS = 8  # of gradient descent per round
SEQUENCES_PER_STEP = 2
HELD_OUT = 2  # sequences that only measure
STEP = 0.3  # Adam's, in steps of int8


class Codebooks:
    """Real-valued codebooks and assignments of one linear, with those of all its experts.

    original float32 [experts, rows, cols] in the file's layout; centroids [experts, rows, n_codebooks * K] in steps of
    int8; scale [experts, rows, 1]; indices int64 [experts, rows, cols] into centroids.
    """

    def __init__(self, linear: Linear, fitted: FittedWeight | FittedExperts, layout: WeightLayout) -> None:
        """From what the k-means found. Rows must have own codebooks and no group scales, inputs no transform."""
        self.linear, self.fitted, self.layout = linear, fitted, layout
        fits = fitted.fits
        assert not layout.hadamard and all(fit.codebook_rows == 1 and fit.group_scales is None for fit in fits)
        self.n_centroids, self.codebook_cols = fits[0].cq.n_centroids, fits[0].codebook_cols
        self.original = torch.stack([torch.from_numpy(fit.w) for fit in fits])
        self.scale = torch.stack([torch.from_numpy(fit.scales) for fit in fits])[..., None].clone()
        self.centroids = torch.stack([torch.from_numpy(fit.centroids).float() for fit in fits]).requires_grad_()
        indices = torch.stack([torch.from_numpy(fit.indices).long() for fit in fits])
        self.indices = indices + self._first_of_codebook()

    def _first_of_codebook(self) -> Tensor:
        return torch.arange(self.original.shape[-1]) // self.codebook_cols * self.n_centroids

    def weight(self) -> Tensor:
        """The float weight of transformers' layer, differentiable by the centroids."""
        stored = self.scale * self.centroids.gather(-1, self.indices)
        return self.layout.from_file(stored.reshape(self.fitted.planned.shape))

    def assign(self, ratio: Tensor) -> None:
        """Every weight w_ij takes the centroid nearest to ratio_j w_ij; ratio [experts, cols] = D2 / D1."""
        with torch.no_grad():
            books = self.centroids.unflatten(-1, (-1, self.n_centroids))
            books.copy_(books.sort(dim=-1).values)
            wanted = self.original * ratio[:, None] / self.scale.clamp_min(torch.finfo(torch.float32).tiny)
            for book in range(books.shape[2]):
                cols = slice(book * self.codebook_cols, (book + 1) * self.codebook_cols)
                middles = (books[:, :, book, 1:] + books[:, :, book, :-1]) / 2
                found = torch.searchsorted(middles.contiguous(), wanted[..., cols].contiguous())
                self.indices[..., cols] = found + book * self.n_centroids

    def round(self) -> None:
        """Centroids to int8, the largest of each row to 127."""
        with torch.no_grad():
            top = self.centroids.abs().amax(dim=-1, keepdim=True)
            self.scale = self.scale * top / 127
            self.centroids.copy_((self.centroids * (127 / top.clamp_min(torch.finfo(torch.float32).tiny))).round())

    def store(self) -> None:
        """Hand the rounded centroids and the assignments over to the fits."""
        indices = (self.indices - self._first_of_codebook()).to(torch.uint8).numpy()
        for i, fit in enumerate(self.fitted.fits):
            fit.centroids[:] = self.centroids[i].detach().numpy()
            fit.scales[:] = self.scale[i, :, 0].numpy()
            fit.indices[:] = indices[i]


@dataclass
class CentroidTuner:
    """Fine-tunes layer after layer.

    hidden [sequences, n, hidden]: the hidden states of the original model, advanced with every layer.
    """

    hidden: Tensor
    router_weight: float
    seed: int

    def tune(self, pair: LayerPair, books: list[Codebooks], quantized_hidden: Tensor) -> Tuned:
        """Fine-tune one layer; its fits change in place, unless its loss on held-out sequences does not fall.

        quantized_hidden: what the quantized layers below it compute, before this layer.
        """
        tuned = self._tune(pair, books, quantized_hidden) if books else Tuned(0, 0.0, 0.0)
        pair.stream.forward(pair.module, self.hidden)
        return tuned

    def _tune(self, pair: LayerPair, books: list[Codebooks], quantized_hidden: Tensor) -> Tuned:
        n = max(1, len(self.hidden) - HELD_OUT)
        held = slice(n, None) if n < len(self.hidden) else slice(None)
        start = self._mean_loss(pair, books, quantized_hidden, held)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(ROUNDS):
            optimizer = torch.optim.Adam([book.centroids for book in books], lr=STEP)  # assigning sorts the centroids
            for _ in range(STEPS):
                chosen = torch.randperm(n, generator=generator)[:SEQUENCES_PER_STEP]
                optimizer.zero_grad()
                self._loss(pair, books, self.hidden[chosen], quantized_hidden[chosen]).backward()
                optimizer.step()
            self._assign(pair, books, quantized_hidden[:n])
        for book in books:
            book.round()
        self._assign(pair, books, quantized_hidden[:n])
        end = self._mean_loss(pair, books, quantized_hidden, held)
        if end < start:
            for book in books:
                book.store()
        return Tuned(ROUNDS * STEPS, start, min(start, end))

    def _loss(self, pair: LayerPair, books: list[Codebooks], hidden: Tensor, quantized_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = pair.outputs(hidden)
        found = pair.outputs(quantized_hidden, _weights(books))
        loss = torch.zeros(())
        for name in (ATTENTION, FFN):
            loss = loss + (found[name] - wanted[name]).square().sum() / wanted[name].square().sum()
        if ROUTER in wanted and self.router_weight:
            p, q = (logits[ROUTER].log_softmax(dim=-1) for logits in (wanted, found))
            loss = loss + self.router_weight * nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        return loss

    def _mean_loss(self, pair: LayerPair, books: list[Codebooks], quantized_hidden: Tensor, rows: slice) -> float:
        batches = list(zip(*(x[rows].split(SEQUENCES_PER_STEP) for x in (self.hidden, quantized_hidden)), strict=True))
        with torch.no_grad():
            losses = [float(self._loss(pair, books, x, quantized)) * len(x) for x, quantized in batches]
        return sum(losses) / sum(len(x) for x, _ in batches)

    def _assign(self, pair: LayerPair, books: list[Codebooks], quantized_hidden: Tensor) -> None:
        hidden = self.hidden[: len(quantized_hidden)]
        batches = zip(*(x.split(SEQUENCES_PER_STEP) for x in (hidden, quantized_hidden)), strict=True)
        sums: dict[str, Tensor] = {}  # linear input -> D1 and D2 [2, experts, cols]
        with torch.no_grad():
            for x, quantized in batches:
                for input_name, products in pair.input_products(x, quantized, _weights(books)).items():
                    sums[input_name] = sums[input_name] + products if input_name in sums else products
        for book in books:
            d1, d2 = sums[book.linear.input]
            book.assign(torch.where(d1 > 0, d2 / d1, 1.0))


def _weights(books: list[Codebooks]) -> dict[str, Tensor]:
    return {book.linear.name: book.weight() for book in books}

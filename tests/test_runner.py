"""The runner against the PyTorch oracle on the same weights and activation quantizer: prefill, decode, threads."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from pyggml_bridge.native import available_isas, choose_isa
from tests.tiny_gguf import Tiny, write_tiny
from tests.torch_oracle import TorchOracle

N_SEQUENCE = 500
MAX_MEAN_KLD = 1e-4

VARIANTS = {
    "dense": Tiny(),
    "moe": Tiny(n_experts=6),
    "moe-cq3-codebooks": Tiny(cq=CQType.CQ3, n_experts=4, top_k=3, group_size=64, scale_group=-1),
    "dense-cq2-int4-bias": Tiny(
        cq=CQType.CQ2, activation_bits=4, biases=True, tied=True, scale_group=128, n_kv_heads=4
    ),
}


def mean_kld(base: np.ndarray, ours: np.ndarray) -> float:
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (base, ours))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    t = VARIANTS[request.param]
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    oracle = TorchOracle(write_tiny(path, t), t)
    tokens = np.random.default_rng(7).integers(0, t.vocab, 4 * N_SEQUENCE).astype(np.int32).reshape(4, N_SEQUENCE)
    return path, tokens, oracle, [oracle.logits(sequence) for sequence in tokens]


def test_prefill_matches_pytorch_over_2000_tokens(case):
    path, tokens, _, expected = case
    model = load_model(path, n_threads=2)
    klds = [mean_kld(want, model.forward(seq, 0, len(seq))) for seq, want in zip(tokens, expected, strict=True)]
    assert np.mean(klds) <= MAX_MEAN_KLD


def test_decode_token_by_token_matches_prefill_and_pytorch(case):
    path, tokens, _, expected = case
    model = load_model(path, n_threads=2)
    sequence = tokens[0]
    decoded = np.concatenate([model.forward(sequence[i : i + 1], i, 1) for i in range(len(sequence))])
    assert mean_kld(expected[0], decoded) <= MAX_MEAN_KLD
    assert mean_kld(model.forward(sequence, 0, len(sequence)), decoded) <= MAX_MEAN_KLD


def test_without_cache_each_prefix_recomputed_matches_pytorch(case):
    path, tokens, _, expected = case
    model = load_model(path, n_threads=2)
    ends = [*range(1, 20), 63, 64, 65, 128, 129, 300, N_SEQUENCE]
    fresh = np.concatenate([model.forward(tokens[0][:end], 0, 1) for end in ends])
    assert mean_kld(expected[0][[end - 1 for end in ends]], fresh) <= MAX_MEAN_KLD


def test_batches_of_any_length_give_the_same_logits(case):
    path, tokens, _, _ = case
    sequence = tokens[1][:130]
    whole = load_model(path, n_batch=512).forward(sequence, 0, 100)
    for n_batch in (1, 7, 64):
        pieces = load_model(path, n_batch=n_batch).forward(sequence, 0, 100)
        assert mean_kld(whole, pieces) <= 1e-6


def test_bit_identical_for_any_number_of_threads(case):
    path, tokens, _, _ = case
    sequence = tokens[2][:100]
    one = load_model(path, n_threads=1).forward(sequence, 0, 100)
    for n_threads in (2, 3, 5):
        assert np.array_equal(one, load_model(path, n_threads=n_threads).forward(sequence, 0, 100))


def test_every_instruction_set_agrees(case):
    path, tokens, _, expected = case
    try:
        for isa in available_isas():
            choose_isa(isa)
            logits = load_model(path, n_threads=2).forward(tokens[3][:200], 0, 200)
            assert mean_kld(expected[3][:200], logits) <= MAX_MEAN_KLD, isa
    finally:
        choose_isa(None)


def test_router_picks_the_oracles_experts(case):
    path, tokens, oracle, _ = case
    if not oracle.t.n_experts:
        assert load_model(path).routing_ids == []
        return
    model = load_model(path, n_threads=2)
    model.forward(tokens[3], 0, 1)
    oracle.logits(tokens[3])
    same = [
        np.sort(ids[:N_SEQUENCE], -1) == np.sort(want.numpy(), -1)
        for ids, want in zip(model.routing_ids, oracle.experts, strict=True)
    ]
    assert np.mean(same) > 0.995  # near ties may fall either way

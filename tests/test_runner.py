"""The runner against the PyTorch oracle on the same weights and activation quantizer: prefill, decode, threads."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model
from pyggml_bridge.native import available_isas, choose_isa
from tests.tiny_gguf import Tiny, TinyFile, write_tiny
from tests.torch_oracle import TorchOracle

N_SEQUENCE = 500
MAX_MEAN_KLD = 1e-4
MAX_REGRET = 0.02  # probability that the runner's experts may lack to the oracle's

VARIANTS = {
    "dense": Tiny(hadamard=64),
    "moe": Tiny(n_experts=6, hadamard=32),
    "moe-cq3-codebooks": Tiny(cq=CQType.CQ3, n_experts=4, top_k=1, group_size=64, scale_group=-1),
    "moe-cq3t": Tiny(cq=CQType.CQ3T, n_experts=3, codebook_rows=8, hidden=192, ffn=128),
    "cq4t-biases": Tiny(cq=CQType.CQ4T, codebook_rows=4, biases=True),
    "moe-cq5-shared": Tiny(cq=CQType.CQ5, n_experts=3, codebook_rows=8, hidden=192, ffn=128),
    "moe-types": Tiny(
        n_experts=6,
        expert_cqs=(CQType.CQ4, CQType.CQ3T, CQType.CQ5, CQType.CQ3T, CQType.CQ4, CQType.CQ2T),
        codebook_rows=8,
    ),
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
    return path, tokens, oracle


def experts_of(model: Model, n_tokens: int) -> list[np.ndarray]:
    """Per MoE layer the experts [n_tokens, top_k] of the last batch."""
    return [ids[:n_tokens].copy() for ids in model.routing_ids]


def oracle_logits(oracle: TorchOracle, tokens: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    """The oracle's logits with the runner's experts, which must be its own up to near ties."""
    logits = oracle.logits(tokens, experts)
    assert oracle.routing_regret <= MAX_REGRET
    return logits


def test_prefill_matches_pytorch_over_2000_tokens(case):
    path, tokens, oracle = case
    model = load_model(path, n_threads=2)
    klds = []
    for sequence in tokens:
        logits = model.forward(sequence, 0, len(sequence))
        klds.append(mean_kld(oracle_logits(oracle, sequence, experts_of(model, len(sequence))), logits))
    assert np.mean(klds) <= MAX_MEAN_KLD


def test_decode_token_by_token_matches_pytorch(case):
    path, tokens, oracle = case
    model = load_model(path, n_threads=2)
    logits, experts = [], []
    for i in range(N_SEQUENCE):
        logits.append(model.forward(tokens[0][i : i + 1], i, 1))
        experts.append(experts_of(model, 1))
    joined = [np.concatenate(layer) for layer in zip(*experts, strict=True)]
    assert mean_kld(oracle_logits(oracle, tokens[0], joined), np.concatenate(logits)) <= MAX_MEAN_KLD


def test_without_cache_each_prefix_recomputed_matches_pytorch(case):
    path, tokens, oracle = case
    model = load_model(path, n_threads=2)
    klds = []
    for end in [*range(1, 20), 63, 64, 65, 128, 129, 300, N_SEQUENCE]:
        logits = model.forward(tokens[0][:end], 0, 1)
        klds.append(mean_kld(oracle_logits(oracle, tokens[0][:end], experts_of(model, end))[-1:], logits))
    assert np.mean(klds) <= MAX_MEAN_KLD


def test_batches_of_any_length_give_the_same_logits(case):
    path, tokens, _ = case
    sequence = tokens[1][:130]
    whole = load_model(path, n_batch=512).forward(sequence, 0, 100)
    for n_batch in (1, 7, 64):
        pieces = load_model(path, n_batch=n_batch).forward(sequence, 0, 100)
        assert mean_kld(whole, pieces) <= 1e-6


def test_bit_identical_for_any_number_of_threads(case):
    path, tokens, _ = case
    sequence = tokens[2][:100]
    one = load_model(path, n_threads=1).forward(sequence, 0, 100)
    for n_threads in (2, 3, 5):
        assert np.array_equal(one, load_model(path, n_threads=n_threads).forward(sequence, 0, 100))


def test_every_instruction_set_agrees(case):
    path, tokens, oracle = case
    try:
        for isa in available_isas():
            choose_isa(isa)
            model = load_model(path, n_threads=2)
            logits = model.forward(tokens[3][:200], 0, 200)
            assert mean_kld(oracle_logits(oracle, tokens[3][:200], experts_of(model, 200)), logits) <= MAX_MEAN_KLD, isa
    finally:
        choose_isa(None)


def test_router_picks_the_oracles_experts(case):
    path, tokens, oracle = case
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


def test_tensors_that_the_architecture_does_not_have_are_refused(tmp_path, monkeypatch):
    """They would change what the model computes, such as norms of queries in a file that says llama."""
    output = TinyFile.output

    def with_norm(file: TinyFile) -> None:
        file.norm("blk.0.attn_q_norm.weight", file.t.head_dim)
        output(file)

    monkeypatch.setattr(TinyFile, "output", with_norm)
    write_tiny(tmp_path / "m.gguf", Tiny())
    with pytest.raises(CQError, match=r"no tensor blk\.0\.attn_q_norm\.weight"):
        load_model(tmp_path / "m.gguf")

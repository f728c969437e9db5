"""The sampler's steps on distributions small enough to work out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from codequant_converter.output.metadata import _sampling_keys
from transformers import GenerationConfig

from pyggml_bridge.errors import CQError
from pyggml_bridge.sampling import Sampler, SamplingConfig

OFF = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# ids by falling probability: 2, 0, 3, 1
PROBABILITIES = np.array([0.3, 0.05, 0.5, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3


def distribution(**changed: float) -> tuple[list[int], np.ndarray]:
    ids, probabilities = Sampler(SamplingConfig(**OFF | changed)).distribution(LOGITS)
    return ids.tolist(), probabilities


def test_without_filters_it_is_the_softmax():
    ids, probabilities = distribution()
    assert ids == [2, 0, 3, 1]
    np.testing.assert_allclose(probabilities, [0.5, 0.3, 0.15, 0.05], rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "ids"),
    [
        ({"top_k": 2}, [2, 0]),
        ({"top_k": 4}, [2, 0, 3, 1]),
        ({"top_k": 100}, [2, 0, 3, 1]),
        ({"top_p": 0.4}, [2]),
        ({"top_p": 0.6}, [2, 0]),
        ({"top_p": 0.79}, [2, 0]),
        ({"top_p": 0.81}, [2, 0, 3]),
        ({"top_p": 0.0}, [2]),
        ({"min_p": 0.29}, [2, 0, 3]),
        ({"min_p": 0.31}, [2, 0]),
        ({"min_p": 1.0}, [2]),
        # 0.5 of the two that top_k leaves is 0.625 of the mass: top_p counts what is left, not the whole vocabulary
        ({"top_k": 2, "top_p": 0.6}, [2]),
        # temperature comes last: it would make token 1 a candidate, or leave token 2 alone
        ({"temp": 100.0, "min_p": 0.31}, [2, 0]),
        ({"temp": 0.01, "top_p": 0.81}, [2, 0, 3]),
    ],
)
def test_candidates(changed, ids):
    found, probabilities = distribution(**changed)
    assert found == ids
    assert probabilities.sum() == pytest.approx(1)


def test_temperature_divides_logits():
    _, probabilities = distribution(temp=0.5, top_k=2)
    np.testing.assert_allclose(probabilities, np.array([0.25, 0.09]) / 0.34, rtol=1e-5)


def test_equal_logits_keep_exactly_k():
    sampler = Sampler(SamplingConfig(**OFF | {"top_k": 3}))
    assert sampler.distribution(np.zeros(10, np.float32))[0].tolist() == [0, 1, 2]


def test_draws_follow_the_distribution_and_the_seed():
    sampler = Sampler(SamplingConfig(**OFF), seed=1)
    n = 20_000
    draws = [sampler.sample(LOGITS, []) for _ in range(n)]
    counts = np.bincount(draws, minlength=4)
    deviation = np.sqrt(n * PROBABILITIES * (1 - PROBABILITIES))
    assert (np.abs(counts - n * PROBABILITIES) < 5 * deviation).all()
    same, other = Sampler(SamplingConfig(**OFF), seed=1), Sampler(SamplingConfig(**OFF), seed=2)
    assert [same.sample(LOGITS, []) for _ in range(100)] == draws[:100]
    assert [other.sample(LOGITS, []) for _ in range(100)] != draws[:100]


def test_greedy_takes_the_largest_even_with_filters_that_would_not():
    assert Sampler(SamplingConfig(temp=0)).sample(LOGITS, []) == 2
    assert Sampler(SamplingConfig(temp=0)).sample(np.array([1.0, 5.0, 5.0], np.float32), []) == 1


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, 1.5, -1.0, -1.4], np.float32)
    original = logits.copy()
    greedy = Sampler(SamplingConfig(temp=0, repeat_penalty=1.5))
    assert greedy.sample(logits, [0, 0]) == 1
    assert greedy.sample(logits, [0, 1]) == 0
    np.testing.assert_array_equal(logits, original)
    negative = Sampler(SamplingConfig(temp=0, repeat_penalty=1.5))
    assert negative.sample(logits[2:], [0]) == 1  # -1.5 is below -1.4


def test_repeat_penalty_looks_at_the_last_tokens_only():
    logits = np.array([2.0, 1.5], np.float32)
    history = [0, 1, 1, 1]
    penalty = {"temp": 0.0, "repeat_penalty": 1.5}
    assert Sampler(SamplingConfig(**penalty, repeat_last_n=3)).sample(logits, history) == 0
    assert Sampler(SamplingConfig(**penalty, repeat_last_n=3)).sample(logits, [1, 0, 0, 0]) == 1
    assert Sampler(SamplingConfig(**penalty, repeat_last_n=0)).sample(logits, [0, 0]) == 0
    assert Sampler(SamplingConfig(**penalty, repeat_last_n=-1)).sample(logits, [0]) == 1


def test_the_user_goes_before_the_file_and_the_file_before_the_defaults():
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.05}
    config = SamplingConfig.resolve(metadata, temp=None, top_k=5, min_p=0.0)
    assert config == SamplingConfig(temp=0.6, top_k=5, top_p=0.95, min_p=0.0, repeat_penalty=1.05)
    assert SamplingConfig.resolve({}) == SamplingConfig(0.8, 40, 0.95, 0.05, 1.0, 64)
    assert SamplingConfig.resolve({}, temp=0).temp == 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temp": -0.1}, "--temp: -0.1"),
        ({"temp": float("nan")}, "--temp"),
        ({"temp": float("inf")}, "--temp"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 1.1}, "--top-p"),
        ({"min_p": -1}, "--min-p"),
        ({"repeat_penalty": 0}, "--repeat-penalty"),
    ],
)
def test_values_out_of_range_are_named(given, named):
    with pytest.raises(CQError, match=named):
        SamplingConfig.resolve({}, **given)


@pytest.mark.parametrize(
    ("key", "value", "field", "off"),
    [
        ("temp", -1.0, "temp", 0.0),
        ("top_k", -1, "top_k", 0),
        ("top_k", 1 << 40, "top_k", 0),
        ("top_p", 1.5, "top_p", 1.0),
        ("top_p", -0.5, "top_p", 1.0),
        ("min_p", -1.0, "min_p", 0.0),
        ("min_p", 2.0, "min_p", 0.0),
        ("min_p", float("nan"), "min_p", 0.0),
        ("penalty_repeat", 0.0, "repeat_penalty", 1.0),
        ("penalty_repeat", float("inf"), "repeat_penalty", 1.0),
        ("penalty_last_n", -7, "repeat_last_n", 0),
    ],
)
def test_numbers_of_a_file_that_are_out_of_range_leave_their_step_out(key, value, field, off):
    config = SamplingConfig.resolve({f"general.sampling.{key}": value})
    assert getattr(config, field) == off
    assert config == SamplingConfig(**{field: off})


@pytest.mark.parametrize("value", [-1, 1.5, "many", [1]])
def test_the_command_line_wins_over_anything_in_the_file(value):
    assert SamplingConfig.resolve({"general.sampling.top_k": value}, top_k=7).top_k == 7
    with pytest.raises(CQError, match="--top-k"):
        SamplingConfig.resolve({"general.sampling.top_k": value}, top_k=-1)


@pytest.mark.parametrize("value", [True, "hot", [1]])
def test_bad_recommendations_of_the_file_are_named(value):
    with pytest.raises(CQError, match=r"general\.sampling\.temp"):
        SamplingConfig.resolve({"general.sampling.temp": value})


def stored(**generation_config: object) -> dict[str, object]:
    """What the converter stores of a checkpoint with this generation_config.json."""
    return _sampling_keys(SimpleNamespace(generation_config=GenerationConfig.from_dict(generation_config)))


def test_the_converter_stores_the_repetition_penalty_of_the_whole_context():
    penalty = {"general.sampling.penalty_repeat": 1.05, "general.sampling.penalty_last_n": -1}
    assert stored(do_sample=True, temperature=0.7, repetition_penalty=1.05) == penalty | {"general.sampling.temp": 0.7}
    assert stored(do_sample=False, temperature=0.7, repetition_penalty=1.05) == penalty
    assert SamplingConfig.resolve(penalty).repeat_last_n == -1


def test_the_converter_stores_off_for_values_that_llama_cpp_does_not_know(capsys):
    odd = {"top_k": -1, "top_p": 1.5, "min_p": -0.1, "repetition_penalty": -2.0, "temperature": 0.5}
    keys = stored(do_sample=True, **odd)
    assert {key.rpartition(".")[2]: value for key, value in keys.items()} == {
        "temp": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0, "penalty_last_n": -1,
    }  # fmt: skip
    assert SamplingConfig.resolve(keys) == SamplingConfig(0.5, 0, 1.0, 0.0, 1.0, -1)
    assert stored(do_sample=True, top_k="all", min_p=0.1) == {"general.sampling.min_p": 0.1}
    assert "top_k is 'all'" in capsys.readouterr().err

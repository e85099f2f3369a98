"""Sampling: what every field does, against a slow definition; the distribution; repeatable draws; refused settings."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from profiler.errors import InputError
from runtime.logprobs import logprob_rows, read_rows
from runtime.requests import LEAST_LOGPROB, SamplingParameters
from runtime.sampling import ROWS_AT_ONCE, History, Sampler, adjust_logits, draw
from runtime.step_plan import Admission
from runtime.worker import RankWorker
from runtime.worker_interface import NO_TOKEN
from tests.support.slow_sampling import slow_choice

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]
LOGITS = torch.tensor(PROBABILITIES).log()
VOCABULARY = 12
TOKENS = st.integers(0, VOCABULARY - 1)


def sampler_of(*requests: SamplingParameters, tokens: list[int] | None = None) -> Sampler:
    """A sampler with sequences numbered from 0."""
    sampler = Sampler()
    for number, sampling in enumerate(requests):
        sampler.admit(Admission(number, tokens or [0], 0, sampling.resolved(())))
    return sampler


def next_of(sampler: Sampler, sequence: int, logits: torch.Tensor) -> int:
    """One sequence's next token."""
    return sampler.choose([sequence], logits[None])[0][sequence]


def draws(count: int, logits: torch.Tensor = LOGITS, **fields: Any) -> Counter[int]:
    """Tokens of sequences with one seed and so many different lengths, all with the same logits."""
    sampling = SamplingParameters(**({"seed": 0} | fields)).resolved(())
    histories = [History(sampling, range(1 + length)) for length in range(count)]
    rows = logits.repeat(count, 1)
    return Counter(draw(adjust_logits(rows, histories), histories).tolist())


@st.composite
def requests(draw_from: st.DrawFn) -> SamplingParameters:
    """Requests with some of the fields; resolved."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.floats(0.05, 1),
        "top_k": st.integers(0, VOCABULARY + 2),
        "min_p": st.sampled_from([0.0, 0.03, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.3, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.3, 3.0]),
        "logit_bias": st.dictionaries(TOKENS, st.integers(-100, 100), max_size=3).map(lambda d: tuple(d.items())),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.sets(TOKENS, max_size=2).map(tuple),
    }
    chosen = draw_from(st.sets(st.sampled_from(sorted(fields))))
    drawn = {name: draw_from(fields[name]) for name in sorted(chosen)}
    return SamplingParameters(seed=draw_from(st.integers(-(2**63), 2**63 - 1)), **drawn).resolved([3])


@settings(max_examples=150)
@given(st.data())
def test_every_field_does_what_the_slow_definition_says(data: st.DataObject) -> None:
    """Several sequences together, each as it is defined for itself."""
    rows = data.draw(st.integers(1, 3))
    integers = st.lists(st.integers(-40, 40), min_size=VOCABULARY, max_size=VOCABULARY)
    logits = [[value / 8 for value in data.draw(integers)] for _ in range(rows)]
    asked = [data.draw(requests()) for _ in range(rows)]
    prompts = [data.draw(st.lists(TOKENS, min_size=1, max_size=4)) for _ in range(rows)]
    outputs = [data.draw(st.lists(TOKENS, max_size=5)) for _ in range(rows)]
    expected = [slow_choice(*row) for row in zip(logits, asked, prompts, outputs, strict=True)]
    assume(all(choice.margin > 1e-4 for choice, sampling in zip(expected, asked, strict=True) if sampling.temperature))

    sampler, histories = Sampler(), []
    for number, (sampling, prompt, output) in enumerate(zip(asked, prompts, outputs, strict=True)):
        sampler.admit(Admission(number, prompt + output, 0, sampling, generated=len(output)))
        histories.append(History(sampling, prompt + output, len(output)))
    adjusted = adjust_logits(torch.tensor(logits), histories)
    for row, choice in enumerate(expected):
        if asked[row].temperature:
            assert set(adjusted[row].isfinite().nonzero()[:, 0].tolist()) == set(choice.left)
        np.testing.assert_allclose(adjusted[row, choice.left], choice.logits[choice.left], atol=1e-4)
    chosen, _ = sampler.choose(range(rows), torch.tensor(logits))
    # Of equal logits after penalties, rounding decides; a greedy choice is one of the greatest.
    for token, choice in zip(chosen.values(), expected, strict=True):
        assert token == choice.token or choice.logits[token] == pytest.approx(choice.logits[choice.token], abs=1e-4)


@settings(max_examples=40)
@given(request=requests(), prompt=st.lists(TOKENS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(
    request: SamplingParameters, prompt: list[int], seed: int
) -> None:
    logits = torch.randn((6, VOCABULARY), generator=torch.Generator().manual_seed(seed))
    whole = Sampler()
    whole.admit(Admission(0, prompt, 0, request))
    tokens = [next_of(whole, 0, row) for row in logits]
    resumed = Sampler()
    resumed.admit(Admission(5, prompt + tokens[:3], 0, request, generated=3))
    assert [next_of(resumed, 5, row) for row in logits[3:]] == tokens[3:]


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1e-300, {0}), (0.49, {0}), (0.51, {0, 1}), (0.76, {0, 1, 2}), (0.91, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_nucleus(top_p: float, nucleus: set[int]) -> None:
    """The smallest set of the most likely tokens whose mass reaches top_p."""
    assert set(draws(400, top_p=top_p)) == nucleus


@pytest.mark.parametrize("fields", [{"top_p": 0.3}, {"top_k": 2}])
def test_the_first_of_equal_tokens_are_kept(fields: dict[str, Any]) -> None:
    assert set(draws(200, torch.zeros(4), **fields)) == {0, 1}


def test_the_nucleus_is_of_what_top_k_leaves() -> None:
    """0.5 and 0.25 are 2/3 and 1/3 of two tokens."""
    assert set(draws(200, top_k=2, top_p=0.6)) == {0}
    assert set(draws(200, top_k=3, top_p=0.6)) == {0, 1}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_distribution(temperature: float, top_p: float) -> None:
    """Within five standard deviations of the binomial count."""
    scaled = [p ** (1 / temperature) for p in PROBABILITIES]
    if top_p < 1:
        scaled = [*scaled[:3], 0]
    count = 4000
    found = draws(count, temperature=temperature, top_p=top_p)
    for token, weight in enumerate(scaled):
        p = weight / sum(scaled)
        assert abs(found[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6])
@pytest.mark.parametrize("fields", [{}, {"min_p": 0.1, "top_k": 3}])
def test_a_tiny_temperature_is_greedy(temperature: float, fields: dict[str, Any]) -> None:
    assert set(draws(20, torch.tensor([-1e4, 3.0, 2.99, 1e4]), temperature=temperature, **fields)) == {3}
    assert set(draws(20, torch.tensor([-math.inf, 2.0, 1.0]), temperature=temperature, **fields)) == {1}


@pytest.mark.parametrize("fields", [{"top_p": 0.95}, {"top_k": 3, "presence_penalty": 0.5}])
def test_draws_depend_on_the_own_request_alone(fields: dict[str, Any]) -> None:
    mine, other = SamplingParameters(seed=7, **fields), SamplingParameters(seed=8, min_p=0.2, logit_bias=((1, 1.0),))
    alone, together = sampler_of(mine), sampler_of(other, mine, other)
    expected = [next_of(alone, 0, LOGITS) for _ in range(50)]
    torch.manual_seed(123)
    rows = [together.choose([2, 1, 0], LOGITS.repeat(3, 1))[0] for _ in range(50)]
    assert [row[1] for row in rows] == expected
    assert [row[2] for row in rows] != expected


def test_more_sequences_than_are_changed_at_once() -> None:
    count = ROWS_AT_ONCE + 3
    asked = [SamplingParameters(seed=number, top_k=2 + number % 2, presence_penalty=1.0) for number in range(count)]
    logits = torch.randn((count, 30), generator=torch.Generator().manual_seed(0))
    together = sampler_of(*asked)
    steps = [together.choose(range(count), logits)[0] for _ in range(3)]
    for number, sampling in enumerate(asked):
        alone = sampler_of(sampling)
        assert [next_of(alone, 0, logits[number]) for _ in range(3)] == [step[number] for step in steps]


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_accepted_seed_works(seed: int) -> None:
    assert set(draws(1, seed=seed)) <= set(range(4))


def test_min_tokens_forbids_what_would_end_the_sequence() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 7.0])
    sampling = SamplingParameters(temperature=0, min_tokens=2, stop_token_ids=(1,))
    for ignore_eos, expected in ((False, [3, 3, 1]), (True, [2, 2, 1])):
        sampler = Sampler()
        resolved = SamplingParameters(**asdict(sampling) | {"ignore_eos": ignore_eos}).resolved([2])
        sampler.admit(Admission(0, [0], 0, resolved))
        assert [next_of(sampler, 0, logits) for _ in range(3)] == expected


def test_tokens_that_the_model_does_not_have_change_nothing() -> None:
    fields: dict[str, Any] = {"logit_bias": ((99, 100.0),), "min_tokens": 1, "stop_token_ids": (98,), "temperature": 0}
    assert set(draws(1, **fields)) == {0}


def test_logprobs_are_of_the_model_whatever_the_request_changes() -> None:
    logits = torch.tensor([[1.0, -math.inf, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    biased = SamplingParameters(temperature=0, logit_bias=((0, 50.0),), logprobs=2)
    sampler = sampler_of(biased, SamplingParameters(temperature=0))
    tokens, logprobs = sampler.choose([0, 1], logits)
    assert tokens == {0: 0, 1: 0}
    assert list(logprobs) == [0]
    expected = torch.log_softmax(logits[0], dim=0)
    found = logprobs[0]
    assert found.chosen == pytest.approx(float(expected[0]))
    assert [token for token, _ in found.top] == [2, 3]
    assert [value for _, value in found.top] == pytest.approx(expected[[2, 3]].tolist())


def test_more_logprobs_than_tokens_and_one_that_json_could_not_carry() -> None:
    rows = logprob_rows(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), {0: 20})
    [found] = read_rows([5], rows).values()
    assert found.chosen == LEAST_LOGPROB
    assert found.top == ((0, 0.0), (1, LEAST_LOGPROB))


def test_greedy_draws_take_the_lowest_of_equal_logits() -> None:
    histories = [History(SamplingParameters(temperature=0, seed=0), [0]) for _ in range(2)]
    assert draw(torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0]]), histories).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("seed", 2**63),
        ("seed", 0.5),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("max_tokens", "2"),
        ("top_k", -1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -math.inf),
        ("repetition_penalty", 0),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((1, 101),)),
        ("logit_bias", ((1, 5), (1, 6))),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("logprobs", False),
    ],
)
def test_what_would_break_a_step_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        SamplingParameters(**{name: value})


@given(requests())
def test_parameters_survive_json(sampling: SamplingParameters) -> None:
    assert SamplingParameters.from_json(json.loads(json.dumps(asdict(sampling)))) == sampling


def test_logits_that_are_no_numbers_give_no_token() -> None:
    worker = RankWorker.__new__(RankWorker)
    worker.everyone_holds_all = True
    worker.group = SimpleNamespace(rank=0)  # type: ignore[assignment]
    fields: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 1}, {"temperature": 0, "logprobs": 1}]
    worker._logprobs = {}
    worker._sampler = sampler_of(*(SamplingParameters(**each) for each in fields))
    logits = torch.tensor([[-math.inf, 1.0], [math.nan, 1.0], [math.inf, 1.0], [math.nan, 1.0]])
    assert worker._sample([0, 1, 2, 3], logits) == {0: 1, 1: NO_TOKEN, 2: NO_TOKEN, 3: NO_TOKEN}

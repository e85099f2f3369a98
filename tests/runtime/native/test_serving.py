"""The engine on a native worker: end of sequence, room in the cache, sampling, and logits that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from profiler.errors import InputError
from runtime.engine import Engine
from runtime.native.model import NativeModel
from runtime.native.worker import NativeWorker
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.worker_interface import ModelFacts
from tests.support.fake_worker import Listener, wait_until
from tests.support.native import native_model
from tests.support.reference import greedy
from tests.support.tiny_models import tiny_model

PROMPT = [5, 6, 7, 8, 9]
Start = Callable[..., Engine]


@pytest.fixture
def start(saved_model: Callable[[str], str]) -> Iterator[Start]:
    engines: list[Engine] = []

    def run(model: NativeModel | None = None, eos: tuple[int, ...] = ()) -> Engine:
        model = model or native_model(saved_model("qwen3_moe"))
        group = cast(Any, SimpleNamespace(world_size=1, device=torch.device("cpu")))
        facts = ModelFacts("native", 128, torch.float32, model.max_context, eos, cache=model.cache_size)
        engine = Engine(NativeWorker(model, facts, group), EngineSettings(), eos, model.max_context)
        engines.append(engine)
        engine.start()
        return engine

    yield run
    for engine in engines:
        engine.shutdown()


def submit(engine: Engine, prompt: list[int], **sampling: Any) -> Listener:
    listener = Listener()
    engine.submit(prompt, SamplingParameters(**({"temperature": 0.0} | sampling)), listener)
    return listener


def tokens_of(listener: Listener) -> list[int | None]:
    return [event.token_id for event in listener.wait()]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2_lite"])
def test_a_sequence_ends_in_the_middle_and_the_others_go_on(
    family: str, start: Start, saved_model: Callable[[str], str]
) -> None:
    tokens, _ = greedy(tiny_model(family), PROMPT, 40)
    other, _ = greedy(tiny_model(family), [100, 11, 12], 40)
    eos = next(token for token in tokens[5:] if token not in other)
    engine = start(native_model(saved_model(family)), eos=(eos,))
    first, second = submit(engine, PROMPT, max_tokens=40), submit(engine, [100, 11, 12], max_tokens=40)
    assert tokens_of(first) == [*tokens[: tokens.index(eos)], None]
    assert first.events[-1].finish_reason == "stop"
    assert tokens_of(second) == other
    assert second.events[-1].finish_reason == "length"


def test_what_can_never_fit_is_refused(start: Start, saved_model: Callable[[str], str]) -> None:
    engine = start(native_model(saved_model("qwen3_moe"), cache_tokens=64))
    with pytest.raises(InputError, match="at most 64 in all"):
        submit(engine, PROMPT, max_tokens=60)
    expected, _ = greedy(tiny_model("qwen3_moe"), PROMPT, 59)
    assert tokens_of(submit(engine, PROMPT, max_tokens=59)) == expected
    wait_until(lambda: engine.status().cache_usage == 0)


def test_sampling_is_repeatable_and_independent_of_the_batch(start: Start) -> None:
    engine = start()
    alone = tokens_of(submit(engine, PROMPT, temperature=1.0, top_p=0.9, seed=5, max_tokens=12))
    together = [
        submit(engine, PROMPT, temperature=1.0, top_p=0.9, seed=seed, max_tokens=12) for seed in (6, 5, -(2**63))
    ]
    texts = [tokens_of(listener) for listener in together]
    assert texts[1] == alone
    assert texts[0] != alone


def test_broken_logits_end_one_request_alone(start: Start, saved_model: Callable[[str], str]) -> None:
    model = native_model(saved_model("qwen3_moe"))
    broken = 77
    model.decoder.weights.embedding[broken] = torch.nan
    engine = start(model)
    healthy = submit(engine, PROMPT, max_tokens=12)
    failing = submit(engine, [5, broken], max_tokens=12)
    assert "not finite" in str(failing.wait()[-1].error)
    assert healthy.wait()[-1].finish_reason in ("length", "error")  # an error only if it generates that token itself
    assert tokens_of(submit(engine, PROMPT, max_tokens=4))[0] is not None

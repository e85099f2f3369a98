"""The engine's scheduling, with a worker that plays back tokens instead of a model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from profiler.errors import InputError
from runtime.engine import Engine
from runtime.requests import EngineError, SamplingParameters, TokenEvent, TokenLogprobs
from runtime.settings import EngineSettings
from runtime.step_plan import StepPlan
from runtime.worker_interface import NO_TOKEN, eos_token_ids
from tests.support.fake_worker import WAIT_S, FakeWorker, Listener, wait_until

EOS = 2

Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    engines: list[tuple[Engine, FakeWorker]] = []

    def build(worker: FakeWorker, context: int = 100, **settings: Any) -> Engine:
        engine = Engine(worker, EngineSettings(**settings), [EOS], context)  # type: ignore[arg-type]
        engines.append((engine, worker))
        return engine

    yield build
    for engine, worker in engines:
        worker.gate.release(1000)
        engine.shutdown()


def submit(engine: Engine, prompt: Sequence[int] = (5,), **sampling: Any) -> Listener:
    listener = Listener()
    engine.submit(prompt, SamplingParameters(**sampling), listener)
    return listener


def test_length_end_and_retirement(make: Make) -> None:
    worker = FakeWorker()
    engine = make(worker)
    engine.start()
    events = submit(engine, max_tokens=3).wait()
    assert events == [TokenEvent(10, None), TokenEvent(10, None), TokenEvent(10, "length")]
    wait_until(lambda: any(plan.retire == [0] for plan in worker.plans))
    assert sum(len(plan.retire) for plan in worker.plans) == 1


def test_logits_that_are_no_numbers_end_one_request_only(make: Make) -> None:
    worker = FakeWorker()
    worker.tokens = lambda sequence, step: NO_TOKEN if (sequence, step) == (0, 1) else 7
    engine = make(worker)
    spoilt, sound = submit(engine, max_tokens=4), submit(engine, max_tokens=4)
    engine.start()
    token, error = spoilt.wait()
    assert token == TokenEvent(7, None)
    assert error.finish_reason == "error"
    assert "dtype" in (error.error or "")
    assert [event.token_id for event in sound.wait()] == [7] * 4
    assert engine.status().failure is None


def test_end_of_sequence(make: Make) -> None:
    worker = FakeWorker()
    worker.tokens = lambda sequence, step: EOS if step == 1 else 7
    engine = make(worker)
    engine.start()
    assert submit(engine, max_tokens=9).wait() == [TokenEvent(7, None), TokenEvent(None, "stop")]
    ignored = submit(engine, max_tokens=3, ignore_eos=True).wait()
    assert [event.token_id for event in ignored] == [7, EOS, 7]
    assert submit(engine, max_tokens=1).wait() == [TokenEvent(7, "length")]


def test_stop_tokens_end_a_sequence_whether_or_not_the_end_is_ignored(make: Make) -> None:
    worker = FakeWorker()
    worker.tokens = lambda sequence, step: [EOS, 7, 9][step]
    engine = make(worker)
    engine.start()
    ignoring = submit(engine, stop_token_ids=(9, 11), ignore_eos=True)
    assert ignoring.wait() == [TokenEvent(EOS, None), TokenEvent(7, None), TokenEvent(None, "stop")]
    assert submit(engine, stop_token_ids=(9, 11)).wait() == [TokenEvent(None, "stop")]


def test_log_probabilities_come_with_their_tokens(make: Make) -> None:
    worker = FakeWorker()
    found = TokenLogprobs(-0.5, ((10, -0.5),))
    worker.logprobs = {0: found}
    engine = make(worker)
    asking, other = submit(engine, max_tokens=2, logprobs=1), submit(engine, max_tokens=1)
    engine.start()
    assert asking.wait() == [TokenEvent(10, None, logprobs=found), TokenEvent(10, "length", logprobs=found)]
    assert other.wait() == [TokenEvent(11, "length")]


def test_at_most_max_sequences_run(make: Make) -> None:
    worker = FakeWorker()
    engine = make(worker, max_sequences=2)
    listeners = [submit(engine, max_tokens=tokens) for tokens in (5, 2, 3)]
    engine.start()
    for listener in listeners:
        assert listener.wait()[-1].finish_reason == "length"
    assert worker.admitted == [[0, 1], [2]]
    joined = next(plan for plan in worker.plans if [a.sequence for a in plan.admit] == [2])
    assert joined.retire == [1], "the place is taken in the step that frees it"


def test_a_batch_that_cannot_be_merged_runs_to_its_end(make: Make) -> None:
    worker = FakeWorker(can_merge=False)
    engine = make(worker)
    listeners = [submit(engine, max_tokens=2), submit(engine, max_tokens=4)]
    engine.start()
    listeners[0].wait()
    listeners.append(submit(engine, max_tokens=1))
    for listener in listeners:
        listener.wait()
    wait_until(lambda: engine.status().running == 0)
    assert worker.admitted[0] == [0, 1]
    last = next(i for i, plan in enumerate(worker.plans) if [a.sequence for a in plan.admit] == [2])
    assert 1 in {number for plan in worker.plans[: last + 1] for number in plan.retire}


def test_whole_batches_are_limited_by_padded_tokens(make: Make) -> None:
    worker = FakeWorker(can_merge=False)
    engine = make(worker, max_prefill_tokens=12)
    listeners = [submit(engine, [5] * length, max_tokens=1) for length in (2, 3, 5, 1, 30, 1)]
    engine.start()
    for listener in listeners:
        listener.wait()
    # 3·2 fits, 5·3 doesn't; 5·2 fits, 30·3 doesn't; one that alone is too long goes alone.
    assert worker.admitted == [[0, 1], [2, 3], [4], [5]]


@pytest.mark.parametrize("running", [True, False])
def test_cancel(make: Make, running: bool) -> None:
    worker = FakeWorker()
    worker.free_running = False
    engine = make(worker, max_sequences=1)
    first, second = submit(engine, max_tokens=5), submit(engine, max_tokens=5)
    engine.start()
    worker.gate.release()
    wait_until(lambda: len(first.events) == 1)
    engine.cancel(0 if running else 1)
    engine.cancel(99)
    worker.gate.release(20)
    cancelled, other = (first, second) if running else (second, first)
    assert cancelled.wait()[-1] == TokenEvent(None, "cancelled")
    assert len(cancelled.events) < 5
    assert other.wait()[-1] == TokenEvent(other.events[0].token_id, "length")
    engine.cancel(0)
    wait_until(lambda: engine.status().running == 0)
    assert sum(event.finish_reason is not None for event in cancelled.events) == 1


def test_a_listener_may_cancel(make: Make) -> None:
    engine = make(FakeWorker())
    events: list[TokenEvent] = []
    done = threading.Event()

    def on_event(event: TokenEvent) -> None:
        events.append(event)
        engine.cancel(0)
        if event.finish_reason is not None:
            done.set()

    engine.submit([5], SamplingParameters(max_tokens=50), on_event)
    engine.start()
    assert done.wait(WAIT_S)
    assert [event.finish_reason for event in events] == [None, "cancelled"]


def test_seeds(make: Make) -> None:
    worker = FakeWorker()
    engine = make(worker)
    for seed in (7, None, None):
        submit(engine, seed=seed, temperature=0.5, top_p=0.9)
    engine.start()
    wait_until(lambda: bool(worker.admitted))
    given, one, other = worker.plans[0].admit
    assert given.sampling == SamplingParameters(temperature=0.5, top_p=0.9, seed=7, stop_token_ids=(EOS,))
    assert one.sampling.seed != other.sampling.seed


def test_sequences_go_to_the_rank_that_has_the_fewest(make: Make) -> None:
    worker = FakeWorker(world_size=3, everyone=False)
    worker.free_running = False
    engine = make(worker)
    for tokens in (9, 1, 9, 9):
        submit(engine, max_tokens=tokens)
    engine.start()
    wait_until(lambda: bool(worker.admitted))
    assert [admission.home for admission in worker.plans[0].admit] == [0, 1, 2, 0]
    worker.gate.release()
    submit(engine, max_tokens=9)
    worker.gate.release(2)
    wait_until(lambda: len(worker.admitted) == 2)
    assert [a.home for plan in worker.plans[1:] for a in plan.admit] == [1], "the second sequence has ended"


def test_all_reduce_has_one_home(make: Make) -> None:
    worker = FakeWorker(world_size=3)
    engine = make(worker)
    for _ in range(3):
        submit(engine)
    engine.start()
    wait_until(lambda: bool(worker.admitted))
    assert {admission.home for admission in worker.plans[0].admit} == {0}


@pytest.mark.parametrize(("prompt", "tokens"), [([], 1), ([5] * 100, 1), ([5] * 50, 51)])
def test_context(make: Make, prompt: list[int], tokens: int) -> None:
    engine = make(FakeWorker(), context=100)
    with pytest.raises(InputError, match="at most 100"):
        submit(engine, prompt, max_tokens=tokens)
    assert engine.status().waiting == 0
    submit(engine, [5] * 99, max_tokens=1)


@pytest.mark.parametrize("token", [-1, 1000])
def test_tokens_that_the_model_does_not_have_are_refused_before_they_end_a_step(make: Make, token: int) -> None:
    worker = FakeWorker()
    worker.facts.vocabulary = 1000
    engine = make(worker)
    engine.start()
    with pytest.raises(InputError, match=f"token id {token}: expected 0 to 999"):
        submit(engine, [5, token, 6])
    assert submit(engine, [0, 999], max_tokens=1).wait() == [TokenEvent(10, "length")]


def test_a_failed_step_ends_all_requests_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.CAUSE_S", 0.05)
    worker = FakeWorker()
    engine = make(worker, max_sequences=1)

    def broken(sequence: int, step: int) -> int:
        raise RuntimeError("no\nluck")

    worker.tokens = broken
    running, waiting = submit(engine), submit(engine)
    engine.start()
    reason = "a decoding step failed: RuntimeError: no luck"
    assert running.wait() == waiting.wait() == [TokenEvent(None, "error", reason)]
    engine.fail("later")
    assert engine.status().failure == reason
    assert not engine.status().ready
    with pytest.raises(EngineError, match="no luck"):
        submit(engine)
    engine.shutdown()
    assert len(running.events) == len(waiting.events) == 1


def test_a_dead_rank_is_the_reason_not_what_it_breaks(make: Make) -> None:
    worker = FakeWorker()
    engine = make(worker)

    def broken(sequence: int, step: int) -> int:
        threading.Timer(0.1, engine.fail, ["rank 1 was killed"]).start()
        raise RuntimeError("connection closed")

    worker.tokens = broken
    listener = submit(engine)
    engine.start()
    assert listener.wait() == [TokenEvent(None, "error", "rank 1 was killed")]


def test_shutdown_tells_open_requests_and_the_ranks(make: Make) -> None:
    worker = FakeWorker(world_size=2)
    worker.free_running = False
    engine = make(worker, max_sequences=1)
    running, waiting = submit(engine), submit(engine)
    engine.start()
    wait_until(lambda: engine.status().running == 1)
    stopper = threading.Thread(target=engine.shutdown)
    stopper.start()
    wait_until(lambda: not engine.status().ready)
    with pytest.raises(EngineError, match="shutting down"):
        submit(engine)
    worker.gate.release(5)
    stopper.join(WAIT_S)
    for listener in (running, waiting):
        assert listener.wait()[-1] == TokenEvent(None, "error", "the server is shutting down")
        assert sum(event.finish_reason is not None for event in listener.events) == 1
    assert worker.sent[-1].stop
    assert not any(plan.stop for plan in worker.sent[:-1])
    engine.fail("a rank that ends now is no failure")
    assert engine.status().failure is None


def test_an_idle_engine_sends_plans_before_the_ranks_time_out(make: Make) -> None:
    worker = FakeWorker()
    engine = make(worker, rank_timeout_s=1)
    engine.start()
    wait_until(lambda: len(worker.plans) >= 3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(worker.executed_at)]
    assert 0.1 < max(gaps) < 1, "neither too late nor all the time"
    assert all(plan == StepPlan() for plan in worker.plans)


def test_many_requests_from_many_threads(make: Make) -> None:
    worker = FakeWorker(world_size=2, everyone=False)
    engine = make(worker, max_sequences=5, max_prefill_tokens=20)
    engine.start()
    listeners: list[Listener] = []

    def client(number: int) -> None:
        for turn in range(20):
            listener = Listener()
            request = engine.submit([5] * (1 + turn), SamplingParameters(max_tokens=1 + turn % 4), listener)
            listeners.append(listener)
            if (turn + number) % 5 == 0:
                engine.cancel(request)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listener in listeners:
        events = listener.wait()
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason in ("length", "cancelled")
    wait_until(lambda: not worker.steps)
    assert len(listeners) == 80
    assert max(len(plan.admit) for plan in worker.plans) <= 5


def test_eos_of_a_model() -> None:
    def find(generation: Any, own: Any) -> tuple[int, ...]:
        return eos_token_ids(SimpleNamespace(eos_token_id=generation), SimpleNamespace(eos_token_id=own))

    assert find([1, 2], 3) == (1, 2)
    assert find(None, 3) == (3,)
    assert find(0, 3) == (0,)
    assert find(None, None) == ()
    assert eos_token_ids(None, SimpleNamespace(eos_token_id=4)) == (4,)

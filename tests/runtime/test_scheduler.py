"""Who runs when: pages on demand, preemption, prompts in pieces, shared prefixes, fair turns, a bounded queue.

`FakeWorker` checks every plan against what workers rely on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import Engine
from runtime.requests import QueueFull, SamplingParameters
from runtime.settings import EngineSettings
from runtime.step_plan import StepPlan
from runtime.waiting import Request, WaitingRequests
from runtime.worker_interface import CacheSize
from tests.support.fake_worker import FakeWorker, Listener
from tests.support.schedules import NEVER, Arrival, Play

SIZE = 4


def stream(sequence: int, step: int) -> int:
    """Every token of every sequence is another."""
    return 1000 * (sequence + 1) + step


def play(schedule: list[Arrival], pages: int = 100, overlaps: bool = False, **changes: Any) -> tuple[Play, FakeWorker]:
    """Play a schedule and check that every request gets its tokens."""
    worker = FakeWorker(cache=CacheSize(pages, SIZE), overlaps=overlaps)
    worker.tokens = stream
    played = Play(worker, EngineSettings(**changes), schedule, pages * SIZE)
    played.check_against([[stream(n, step) for step in range(a.max_tokens)] for n, a in enumerate(schedule)])
    assert played.status.cache_usage == 0
    return played, worker


def prompt(length: int, stem: int = 0) -> tuple[int, ...]:
    return tuple(10 * stem + 5 for _ in range(length))


def starts(plans: list[StepPlan], sequence: int) -> list[int]:
    return [at for at, plan in enumerate(plans) for a in plan.admit if a.sequence == sequence]


def test_a_sequence_holds_the_pages_that_it_needs() -> None:
    played, _ = play([Arrival(0, prompt(5), 300)])
    assert len(played.plans[0].admit[0].pages) == 2
    grown = [at for at, plan in enumerate(played.plans) if plan.grow]
    assert grown == list(range(4, 300, SIZE)), "the page of the 9th, 13th, … token comes with the step that writes it"


def test_the_youngest_makes_room_and_goes_on_where_it_was() -> None:
    schedule = [Arrival(0, prompt(4, n), 30) for n in range(3)]
    played, _ = play(schedule, pages=14, prefix_cache=False)
    assert played.status.preemptions > 0
    assert len(starts(played.plans, 0)) == 1, "the oldest never waits again"
    again = [a for plan in played.plans for a in plan.admit if a.generated]
    assert again
    for admission in again:
        generated = admission.tokens[4:]
        assert generated == [stream(admission.sequence, step) for step in range(admission.generated)]


def test_no_more_hits_than_tokens_looked_up_even_after_preemptions() -> None:
    played, _ = play([Arrival(0, prompt(8, n), 10) for n in range(2)], pages=8)
    again = [a for plan in played.plans for a in plan.admit if a.generated]
    assert any(admission.cached for admission in again), "it finds its own pages again"
    assert played.status.prefix_hit_tokens == 0, "nobody's prompt begins like another's"


def test_nobody_new_goes_before_a_preempted_one() -> None:
    schedule = [Arrival(0, prompt(4, n), 30) for n in range(2)] + [Arrival(0, prompt(2, 3), 2)]
    played, _ = play(schedule, pages=10, max_sequences=2, prefix_cache=False)
    gone = next(at for at, plan in enumerate(played.plans) if 1 in plan.retire)
    assert starts(played.plans, 1)[1] > gone + 1
    assert starts(played.plans, 2)[0] >= starts(played.plans, 1)[1]


def test_a_long_prompt_is_fed_between_the_steps_of_what_runs() -> None:
    schedule = [Arrival(0, prompt(3, 1), 40), Arrival(3, prompt(100, 2), 2)]
    played, _ = play(schedule, max_prefill_tokens=16)
    pieces = [(at, piece) for at, plan in enumerate(played.plans) for piece in plan.feed if piece.sequence == 1]
    assert [piece.stop - piece.start for _, piece in pieces] == [16] * 6 + [4]
    assert [at for at, _ in pieces] == list(range(pieces[0][0], pieces[0][0] + 7))
    assert all(plan.decode for plan in played.plans)


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    schedule = [Arrival(0, prompt(200, 1), 2)] + [Arrival(2, prompt(4, n), 2) for n in range(2, 6)]
    played, _ = play(schedule, max_prefill_tokens=16)
    for sequence in range(1, 5):
        assert starts(played.plans, sequence)[0] <= 5
    widths = [plan.prompt_tokens for plan in played.plans if plan.feed]
    assert max(widths) <= 16
    long = [piece.stop - piece.start for plan in played.plans for piece in plan.feed if piece.sequence == 0]
    assert min(long[:-1]) >= 8, "half of a step at least"


def test_one_that_does_not_fit_is_passed_by_a_bounded_number() -> None:
    schedule = [Arrival(0, prompt(180, 1), 150), Arrival(1, prompt(200, 2), 2)]
    schedule += [Arrival(2, prompt(2, 3 + n), 2) for n in range(40)]
    played, _ = play(schedule, pages=90, max_sequences=3)
    before = sum(starts(played.plans, number)[0] < starts(played.plans, 1)[0] for number in range(2, 42))
    assert before == 16


def test_users_take_turns() -> None:
    schedule = [Arrival(0, prompt(2, n), 3, user="many") for n in range(6)]
    schedule += [Arrival(1, prompt(2, 10 + n), 3, user=user) for n, user in enumerate(["few", "", "few"])]
    played, _ = play(schedule, max_sequences=1)
    order = [a.sequence for plan in played.plans for a in plan.admit]
    assert order == [0, 1, 6, 7, 2, 8, 3, 4, 5]


def test_turns_of_waiting_requests() -> None:
    waiting = WaitingRequests()

    def request(number: int, user: str) -> Request:
        return Request(number, [1], 1, SamplingParameters(), lambda event: None, user)

    requests = [request(number, user) for number, user in enumerate("aaabbc")]
    for each in requests:
        waiting.add(each)
    assert [each.number for each in waiting] == [0, 3, 5, 1, 4, 2]
    waiting.take(requests[0])
    assert [each.number for each in waiting] == [3, 5, 1, 4, 2]
    waiting.take(requests[3])
    for number in (8, 7):
        waiting.put_back(request(number, "b"))
    assert [each.number for each in waiting] == [7, 8, 5, 1, 4, 2]
    assert len(waiting) == 6


def test_one_that_is_cancelled_while_it_waits_does_not_cost_its_user_the_turn() -> None:
    waiting = WaitingRequests()
    requests = [Request(n, [1], 1, SamplingParameters(), lambda event: None, u) for n, u in enumerate("aab")]
    for each in requests:
        waiting.add(each)
    waiting.remove(requests[0])
    assert [each.number for each in waiting] == [1, 2]
    for each in requests[1:]:
        waiting.remove(each)
    assert len(waiting) == 0
    assert list(waiting) == []


def test_prompts_that_begin_alike_share_pages() -> None:
    common = prompt(11)
    schedule = [Arrival(0, common, 9), Arrival(0, common, 3), Arrival(4, (*common[:8], 77, 78), 2)]
    played, _ = play(schedule)
    first, same, alike = (starts(played.plans, number)[0] for number in range(3))
    by_number = {a.sequence: a for plan in played.plans for a in plan.admit}
    assert (first, same) == (0, 0)
    assert alike > 0
    for number in (1, 2):
        assert by_number[number].cached == 8
        assert by_number[number].pages[:2] == by_number[0].pages[:2]
        assert by_number[number].pages[2] != by_number[0].pages[2]
    assert played.status.prefix_hit_tokens == 16
    assert played.status.prompt_tokens == 32
    assert [played.events[number][0].cached_tokens for number in range(3)] == [0, 8, 8]


def test_a_conversation_finds_what_it_has_generated() -> None:
    first = [stream(0, step) for step in range(10)]
    follow_up = (*prompt(6), *first, 99)
    played, _ = play([Arrival(0, prompt(6), 10), Arrival(NEVER, follow_up, 2)])
    assert played.events[1][0].cached_tokens == 12, "of 15 in the cache, those in full pages"


def test_prefix_cache_off() -> None:
    played, _ = play([Arrival(0, prompt(11), 3), Arrival(0, prompt(11), 3)], prefix_cache=False)
    assert played.status.prefix_hit_tokens == 0


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = Engine(FakeWorker(), EngineSettings(max_waiting=2), [], 100)  # type: ignore[arg-type]
    for _ in range(2):
        engine.submit([5], SamplingParameters(), Listener())
    with pytest.raises(QueueFull, match="2 requests are waiting, as many as may") as refused:
        engine.submit([5], SamplingParameters(), Listener())
    assert 1 <= refused.value.retry_after_s <= 60
    assert engine.status().waiting == 2


class LateWorker(FakeWorker):
    """Gives a step's tokens only when asked, and notes the order of launches and answers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(overlaps=True, **settings)
        self.log: list[str] = []

    def launch(self, plan: StepPlan) -> Callable[[], dict[int, int]]:
        self.log.append("launch")
        tokens = self.execute(plan)

        def answer() -> dict[int, int]:
            self.log.append("tokens")
            return tokens

        return answer


def test_steps_of_the_same_sequences_follow_without_waiting_for_tokens() -> None:
    worker = LateWorker(cache=CacheSize(50, SIZE))
    worker.tokens = stream
    schedule = [Arrival(0, prompt(3, n), 12) for n in range(2)]
    played = Play(worker, EngineSettings(), schedule, 200)
    played.check_against([[stream(n, step) for step in range(12)] for n in range(2)])
    # Feeding; a decode step; ten more of which each follows before the answer to the one before it; retirement.
    ahead = ["launch", "tokens"] * 10
    assert worker.log[:25] == ["launch", "tokens", "launch", *ahead, "tokens", "launch"]
    assert len([plan for plan in played.plans if plan.decode and not plan.retire and not plan.feed]) == 11
    assert played.status.decode_steps == 11


def test_a_sequence_that_ends_while_the_next_step_is_under_way_gets_nothing_more() -> None:
    worker = LateWorker(cache=CacheSize(50, SIZE))
    worker.tokens = stream
    events = Play(worker, EngineSettings(), [Arrival(0, prompt(3), 50)], 200, eos=(stream(0, 5),)).events[0]
    assert [event.token_id for event in events] == [*(stream(0, step) for step in range(5)), None]


def test_what_the_engine_says_of_itself() -> None:
    worker = FakeWorker(cache=CacheSize(20, SIZE))
    worker.free_running = False
    engine = Engine(worker, EngineSettings(), [], 80)  # type: ignore[arg-type]
    listeners = [Listener() for _ in range(2)]
    for listener in listeners:
        engine.submit([5] * 6, SamplingParameters(max_tokens=3), listener)
    engine.start()
    worker.gate.release(2)
    threading.Event().wait(0.05)
    status = engine.status()
    assert (status.cache_tokens, status.prompt_tokens) == (80, 12)
    assert status.cache_usage == pytest.approx(3 / 20)
    worker.gate.release(10)
    for listener in listeners:
        listener.wait()
    status = engine.status()
    assert (status.generated_tokens, status.decode_steps, status.preemptions) == (6, 2, 0)
    assert [(time.batch, time.prompt_tokens) for time in status.step_times] == [(2, 0)] * 2
    assert all(time.seconds > 0 for time in status.step_times)
    first = listeners[0].events[0]
    assert first.queued_s is not None
    assert first.queued_s >= 0
    engine.shutdown()


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 40),
        prompt=st.builds(prompt, st.integers(1, 30), st.integers(0, 1)),
        max_tokens=st.integers(1, 30),
        cancel_after=st.one_of(st.none(), st.integers(1, 12)),
        user=st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=12,
).map(lambda arrivals: sorted(arrivals, key=lambda arrival: arrival.step))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    schedule=ARRIVALS,
    pages=st.integers(15, 40),
    overlaps=st.booleans(),
    prefix_cache=st.booleans(),
    max_prefill_tokens=st.integers(1, 40),
    max_sequences=st.integers(1, 8),
)
def test_any_schedule(schedule: list[Arrival], pages: int, **changes: Any) -> None:
    play(schedule, pages, **changes)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(schedule=ARRIVALS, everyone=st.booleans(), can_merge=st.booleans(), can_pad=st.booleans())
def test_any_schedule_on_ranks_whose_caches_grow(schedule: list[Arrival], **abilities: bool) -> None:
    worker = FakeWorker(world_size=3, **abilities)
    worker.tokens = stream
    played = Play(worker, EngineSettings(max_prefill_tokens=20, max_sequences=5), schedule)
    played.check_against([[stream(n, step) for step in range(a.max_tokens)] for n, a in enumerate(schedule)])
    assert [plan.to_json() for plan in worker.sent[:-1]] == [plan.to_json() for plan in worker.plans]

"""What the next step does: which requests come, which pieces of prompts are fed, who gets pages, who loses them.

See ``docs/serving.md``, "How requests are scheduled". Everything here follows from the requests' tokens; no clocks, no
threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from runtime.pages import PagePool, page_names
from runtime.settings import EngineSettings
from runtime.step_plan import Admission, Piece, StepPlan
from runtime.waiting import Request, WaitingRequests
from runtime.worker_interface import Worker

MOST_PASSED = 16  # requests that go before one that does not fit into the cache yet
LOOK_AHEAD = 8  # waiting requests looked at beyond those there are places for
SHORT_PROMPT = 4  # a prompt of at most this part of a step's tokens is never cut to let others in


class Scheduler:
    """Plans steps for the requests that run and wait.

    Args:
        worker: rank 0's; says what its path can do and how large its cache is.
        settings: limits of a step.

    Attributes:
        waiting: requests without a place.
        running: requests that are being fed or decoded, by number, in the order of admission.
        num_decoding: requests that the step planned last decodes.
        preemptions: requests that lost their pages and wait again, ever.
        prompt_tokens: of all requests that were ever admitted.
        prefix_hit_tokens: how many of these the cache held already.
    """

    def __init__(self, worker: Worker, settings: EngineSettings) -> None:
        self.waiting = WaitingRequests()
        self.running: dict[int, Request] = {}
        self.num_decoding = 0
        self.preemptions = self.prompt_tokens = self.prefix_hit_tokens = 0
        self._settings, self._model = settings, worker.model
        homes = 1 if worker.everyone_holds_all else worker.group.world_size
        size = worker.facts.cache
        self._homes = range(homes)
        self._pools = [PagePool(size.num_pages, size.page_size) for _ in self._homes] if size is not None else []
        self._retire: list[int] = []
        self._decodes_alone = False  # the step planned last only decodes
        self._blocked = False  # nobody who waits could come into the step planned last

    @property
    def cache_tokens(self) -> int:
        """Tokens that the caches hold room for; 0 where they grow as needed."""
        return sum(pool.num_pages * pool.page_size for pool in self._pools)

    @property
    def cache_usage(self) -> float:
        """Share of the caches' pages that sequences hold."""
        pages = sum(pool.num_pages for pool in self._pools)
        return 1 - sum(pool.num_available for pool in self._pools) / pages if pages else 0.0

    @property
    def must_tell(self) -> bool:
        """Whether the ranks still hold sequences that have ended."""
        return bool(self._retire)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.add(request)
        self._blocked = False

    def end(self, request: Request) -> None:
        """Forget a request, running or waiting."""
        self._blocked = False
        if request.number not in self.running:
            self.waiting.remove(request)
            return
        self._leave(request)

    def note(self, request: Request, token: int) -> None:
        """Add a running request's new token."""
        request.tokens.append(token)
        if self._pools and request.fed // self._pools[0].page_size > request.num_named:
            self._name_pages(request)

    # --- plans ---------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step; every sequence's newest token must be known."""
        if not self._model.can_merge:
            return self._plan_whole_batch()
        decoding = sorted((r for r in self.running.values() if r.decodes), key=lambda request: request.number)
        before = self.preemptions
        grow = self._grow(decoding)
        decoding = [request for request in decoding if request.number in self.running]
        admit, feed = self._feed(may_admit=self.preemptions == before)
        for request in decoding:
            request.fed += 1
        retire, self._retire = self._retire, []
        self.num_decoding = len(decoding)
        self._decodes_alone = not (retire or admit or feed)
        self._blocked = bool(self.waiting)
        return StepPlan(retire, admit, grow, feed)

    def plan_ahead(self) -> StepPlan | None:
        """The step after the one planned last, while its tokens are not known; None where it may do more than decode.

        A sequence that ends with an unknown token takes part once more, for nothing.
        """
        may_admit = len(self.waiting) and not self._blocked and len(self.running) < self._settings.max_sequences
        if not self._decodes_alone or self._retire or may_admit or not self.running:
            return None
        growing: list[Request] = []
        for request in self.running.values():
            if request.num_generated + 1 >= request.sampling.max_tokens:
                return None
            if self._pools and request.fed >= len(request.pages) * self._pools[0].page_size:
                growing.append(request)
        if any(sum(r.home == home for r in growing) > pool.num_available for home, pool in enumerate(self._pools)):
            return None
        for request in self.running.values():
            request.fed += 1
        return StepPlan(grow=[self._take_page(request) for request in growing])

    def _plan_whole_batch(self) -> StepPlan:
        """For families whose sequences cannot join others: whole prompts together, and then these to their end."""
        retire, self._retire = self._retire, []
        self.num_decoding = len(self.running)
        if self.running:
            return StepPlan(retire)
        admissions: list[Admission] = []
        longest = 0
        for request in list(itertools.islice(self.waiting, self._settings.max_sequences)):
            longest = max(longest, len(request.tokens))
            if admissions and longest * (len(admissions) + 1) > self._settings.max_prefill_tokens:
                break
            if admissions and not self._model.can_pad and len(request.tokens) != len(admissions[0].tokens):
                break
            admission = self._admit(request)
            assert admission is not None
            admissions.append(admission)
            request.fed = request.to_feed
        return StepPlan.prefill(admissions, retire)

    # --- pages ---------------------------------------------------------------------------------------------------

    def _grow(self, decoding: Sequence[Request]) -> list[tuple[int, int]]:
        """Give every sequence the page that its next token needs, the oldest first, if need be the youngest one's."""
        grow: list[tuple[int, int]] = []
        for request in decoding if self._pools else ():
            pool = self._pools[request.home]
            if request.number not in self.running or request.fed < len(request.pages) * pool.page_size:
                continue
            while not pool.num_available:
                youngest = max((r for r in self.running.values() if r.home == request.home), key=lambda r: r.number)
                self._preempt(youngest)
                if youngest is request:
                    break
            else:
                grow.append(self._take_page(request))
        return grow  # whoever had to go is younger than all of these

    def _take_page(self, request: Request) -> tuple[int, int]:
        (page,) = self._pools[request.home].take(1)
        request.pages.append(page)
        return request.number, page

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it waits, and then goes on from what it has generated."""
        self._leave(request)
        request.fed = request.to_feed = request.num_named = 0
        request.pages = []
        self.preemptions += 1
        self.waiting.put_back(request)

    def _leave(self, request: Request) -> None:
        del self.running[request.number]
        self._retire.append(request.number)
        if self._pools:
            self._pools[request.home].release(request.pages)

    def _name_pages(self, request: Request) -> None:
        """Let others find the pages that are full, or will be after the steps planned so far."""
        if not self._settings.prefix_cache or not self._pools:
            return
        pool = self._pools[request.home]
        full = min(request.fed, len(request.tokens)) // pool.page_size
        if full > len(request.names):
            request.names = page_names(request.tokens, pool.page_size, request.names)
        for place in range(request.num_named, full):
            pool.name(request.pages[place], request.names[place])
        request.num_named = max(request.num_named, full)

    # --- prompts -------------------------------------------------------------------------------------------------

    def _feed(self, may_admit: bool) -> tuple[list[Admission], list[Piece]]:
        """Share the step's tokens out: first to prompts that have begun, then to those that can come."""
        admit: list[Admission] = []
        feed: list[Piece] = []
        left = self._settings.max_prefill_tokens
        begun = [request for request in self.running.values() if not request.decodes]
        for place, request in enumerate(begun):
            left -= self._cut(request, left, place + 1 < len(begun) or len(self.waiting) > 0, feed)
        places = self._settings.max_sequences - len(self.running)
        waiting = list(itertools.islice(self.waiting, places + LOOK_AHEAD)) if may_admit and places > 0 else []
        passed: list[Request] = []
        for request in waiting:
            if left == 0 or len(self.running) >= self._settings.max_sequences:
                break
            admission = self._admit(request)
            if admission is not None:
                admit.append(admission)
                left -= self._cut(request, left, len(self.waiting) > 0, feed)
                for other in passed:
                    other.passed += 1
            elif request.preempted or request.passed >= MOST_PASSED:
                break
            else:
                passed.append(request)
        return admit, feed

    def _cut(self, request: Request, left: int, others_wait: bool, feed: list[Piece]) -> int:
        """Feed a request's next tokens, as many as are left; but half of these, if others wait, of a long prompt."""
        needed = request.to_feed - request.fed
        short = needed <= self._settings.max_prefill_tokens // SHORT_PROMPT
        count = min(needed, left if short or not others_wait else -(-left // 2))
        if count:
            feed.append(Piece(request.number, request.fed, request.fed + count))
            request.fed += count
            self._name_pages(request)
        return count

    def _admit(self, request: Request) -> Admission | None:
        """Give a waiting request a place and pages for its tokens; None where there are too few.

        A page per running sequence stays free, so that not everyone who comes has to go again at once.
        """
        request.home = self._choose_home()
        cached = 0
        if self._pools:
            pool = self._pools[request.home]
            shared: list[int] = []
            if self._settings.prefix_cache:
                request.names = page_names(request.tokens, pool.page_size, request.names)
                shared = pool.find(request.names[: (len(request.tokens) - 1) // pool.page_size])
            new = pool.pages_for(len(request.tokens)) - len(shared)
            running = sum(other.home == request.home for other in self.running.values())
            if pool.num_taken(shared, new) + running > pool.num_available:
                return None
            pool.share(shared)
            request.pages = [*shared, *pool.take(new)]
            request.num_named = len(shared)
            cached = len(shared) * pool.page_size
        generated = request.num_generated
        if not request.preempted:
            self.prompt_tokens += request.num_prompt
            self.prefix_hit_tokens += cached
            request.cached = cached
        self.waiting.take(request)
        request.fed, request.to_feed = cached, len(request.tokens)
        self.running[request.number] = request
        tokens, pages = list(request.tokens), list(request.pages)
        return Admission(request.number, tokens, request.home, request.sampling, generated, pages, cached)

    def _choose_home(self) -> int:
        """The rank with the fewest sequences (``allreduce`` samples everything on rank 0)."""
        sequences = [0] * len(self._homes)
        for request in self.running.values():
            sequences[request.home] += 1
        return min(self._homes, key=lambda rank: (sequences[rank], rank))

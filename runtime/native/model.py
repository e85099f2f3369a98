"""Sequences on the native path: admission to the paged cache, prefill, decode steps, retirement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from kernels.sample import sample
from runtime.errors import InputError
from runtime.native.cache import PageAllocator
from runtime.native.forward import Decoder
from runtime.native.prefill import Piece, Prompt, prefill
from runtime.native.replayed_routes import ReplayedRoutes
from runtime.native.rows import Rows, RunningSequence
from runtime.native.step import EagerStep, GraphedStep
from runtime.recording import Fed, RouteRecording
from runtime.step_plan import Admission
from runtime.worker_interface import NO_TOKEN

LEAST_PAGES = 16  # columns of the smallest page table; larger ones are four times the next smaller


class NativeModel:
    """The model and its running sequences on one rank.

    Args:
        decoder: with weights and cache.
        max_sequences: decoded together.
        max_prefill_tokens: fed in one pass of a prefill.
        graphs: whether decode steps run as CUDA graphs.

    Attributes:
        logits: of the last prefill or step, one row per sequence that took part; the next one may overwrite them.
        recording: takes the routes of every pass, where they are recorded.
    """

    can_merge = True
    can_pad = True

    def __init__(self, decoder: Decoder, max_sequences: int, max_prefill_tokens: int, graphs: bool) -> None:
        self.decoder, self.max_sequences, self.max_prefill_tokens = decoder, max_sequences, max_prefill_tokens
        cache = decoder.cache
        self.pages = PageAllocator(cache.num_tokens // cache.page_size, cache.page_size)
        self.max_context = min(len(decoder.rotary), cache.num_tokens)
        self.logits: torch.Tensor | None = None
        self.recording: RouteRecording | None = None
        self._sequences: dict[int, RunningSequence] = {}
        self._rows: dict[tuple[int, int], Rows] = {}
        self._filled: Rows | None = None  # rows that hold the running sequences as they stand
        self._graphs: dict[tuple[int, int, bool], GraphedStep] | None = {} if graphs else None
        self._replayed: ReplayedRoutes | None = None
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    @property
    def running(self) -> list[int]:
        """Numbers of the sequences, in the order of admission."""
        return list(self._sequences)

    def has_room(self, tokens: Sequence[int], retiring: Sequence[int]) -> bool:
        """Whether new sequences of at most so many tokens each fit, once others have retired."""
        rows = len(self._sequences) - len(retiring) + len(tokens)
        free = self.pages.num_free + sum(self.pages.pages_held(sequence) for sequence in retiring)
        return rows <= self.max_sequences and sum(map(self.pages.pages_for, tokens)) <= free

    def retire(self, sequences: Sequence[int]) -> None:
        """Drop sequences and free their pages."""
        for sequence in sequences:
            del self._sequences[sequence]
            self.pages.release(sequence)
        if sequences:
            self._filled = None
            if self.recording is not None:
                self.recording.end(sequences)

    def prefill(self, admissions: Sequence[Admission]) -> dict[int, int]:
        """Admit sequences and feed their prompts.

        Returns:
            Each one's first new token.

        Raises:
            InputError: they do not fit; nothing has run then.
        """
        totals = [len(admission.tokens) + admission.new_tokens for admission in admissions]
        if not self.has_room(totals, ()) or max(totals) > self.max_context:
            free = self.pages.num_free * self.pages.page_size
            raise InputError(
                f"{len(totals)} sequences of up to {max(totals)} tokens: expected at most {self.max_sequences}, of "
                f"{self.max_context} tokens each and {free} in the free part of the cache; ask for fewer or "
                "shorter ones, or raise max_sequences or cache_tokens"
            )
        prompts = []
        for admission, total in zip(admissions, totals, strict=True):
            prompts.append(Prompt(admission.tokens, self.pages.allocate(admission.sequence, total)))
        note_routes = None if self.recording is None else partial(self._note_prefill, self.recording, admissions)
        hidden = prefill(self.decoder, prompts, self.max_prefill_tokens, note_routes)
        started = [
            RunningSequence(prompt.pages, len(prompt.tokens), 0, a.sampling)
            for prompt, a in zip(prompts, admissions, strict=True)
        ]
        tokens = self._sample_first(hidden, started)
        for admission, sequence, token in zip(admissions, started, tokens, strict=True):
            sequence.token = token
            self._sequences[admission.sequence] = sequence
        self._filled = None
        return {admission.sequence: token for admission, token in zip(admissions, tokens, strict=True)}

    @staticmethod
    def _note_prefill(
        recording: RouteRecording,
        admissions: Sequence[Admission],
        pieces: Sequence[Piece],
        routes: Sequence[torch.Tensor],
    ) -> None:
        found = [(admissions[piece.number], piece) for piece in pieces]
        fed = [Fed(a.sequence, a.tokens[piece.start : piece.stop], False, piece.start) for a, piece in found]
        recording.note(fed, routes, None)

    @torch.inference_mode()
    def _sample_first(self, hidden: torch.Tensor, started: Sequence[RunningSequence]) -> list[int]:
        self.logits = linear(hidden, self.decoder.weights.head)
        rows = Rows.empty(len(started), 1, hidden.device)
        rows.fill(started)
        chosen = sample(self.logits, rows.temperature, rows.seeds, rows.positions, rows.top_p)
        tokens: list[int] = chosen.where(self.logits.amax(dim=-1).isfinite(), NO_TOKEN).tolist()
        return tokens

    def decode(self) -> dict[int, int]:
        """Feed every sequence's newest token and sample its next."""
        running = list(self._sequences.values())
        num_rows = bucket_of(len(running), self.max_sequences)
        num_pages = self._num_pages(max(sequence.position for sequence in running) + 1)
        nucleus = any(sequence.sampling.top_p < 1 for sequence in running)
        step = self._step(num_rows, num_pages, nucleus)
        rows = self._rows[num_rows, num_pages]
        if rows is not self._filled:
            rows.fill(running)
            self._filled = rows
        if self._replayed is not None:
            self._replayed.advance()
        self.logits = step()[: len(running)]
        if self.recording is not None:
            fed = [
                Fed(number, [sequence.token], True, sequence.position) for number, sequence in self._sequences.items()
            ]
            self.recording.note(fed, step.routes, None)
        tokens = rows.sampled[: len(running)].tolist()
        for sequence, token in zip(running, tokens, strict=True):
            sequence.token = token
            sequence.position += 1
        return dict(zip(self._sequences, tokens, strict=True))

    def replay(self, routes: torch.Tensor | None) -> None:
        """Take the experts of the next decode steps from routes ``[S, L, T, K]``; None ends that."""
        self._replayed = None
        if routes is not None:
            num_rows = bucket_of(routes.shape[2], self.max_sequences)
            self._replayed = ReplayedRoutes(self.decoder, routes, num_rows)
        self.decoder.replace_routes = self._replayed
        if self._graphs is not None:
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # the old one goes with the last graph of it

    def capture(self, max_rows: int) -> None:
        """Capture the steps of up to so many sequences with short contexts before they are needed."""
        for num_rows in sorted({bucket_of(rows + 1, self.max_sequences) for rows in range(max_rows)}, reverse=True):
            self._step(num_rows, self._num_pages(1), False)

    def _num_pages(self, tokens: int) -> int:
        """Columns of the page table for contexts of so many tokens."""
        columns, most = LEAST_PAGES, self.pages.pages_for(self.max_context)
        while columns < self.pages.pages_for(tokens):
            columns *= 4
        return min(columns, most)

    def _step(self, num_rows: int, num_pages: int, nucleus: bool) -> GraphedStep | EagerStep:
        if (num_rows, num_pages) not in self._rows:
            self._rows[num_rows, num_pages] = Rows.empty(num_rows, num_pages, self.decoder.rotary.device)
        rows = self._rows[num_rows, num_pages]
        if self._graphs is None:
            return EagerStep(self.decoder, rows, nucleus)
        if (num_rows, num_pages, nucleus) not in self._graphs:
            self._graphs[num_rows, num_pages, nucleus] = GraphedStep(self.decoder, rows, nucleus, self._pool)
            self._filled = None  # the rows have advanced
        return self._graphs[num_rows, num_pages, nucleus]


def bucket_of(num_sequences: int, most: int) -> int:
    """Rows of the smallest step that takes so many sequences: powers of two, then multiples of 8, then of 32."""
    if num_sequences <= 4:
        return min(1 << (num_sequences - 1).bit_length(), most)
    multiple = 8 if num_sequences <= 64 else 32
    return min(-(-num_sequences // multiple) * multiple, most)

"""Sequences on the native path: their prompts fed into the paged cache, decode steps, retirement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import linear

from kernels.sample import sample
from runtime.load import Load
from runtime.native.forward import Decoder
from runtime.native.new_tokens import NewTokens
from runtime.native.prefill import prefill, without_padding
from runtime.native.replayed_routes import ReplayedIds, ReplayedRoutes, replay
from runtime.native.rows import Rows, RunningSequence
from runtime.native.step import EagerStep, GraphedStep
from runtime.recording import Fed, RouteRecording
from runtime.sampling import Sampler
from runtime.step_plan import Admission, Piece, StepPlan
from runtime.worker_interface import NO_TOKEN, CacheSize

LEAST_PAGES = 16  # columns of the smallest page table; larger ones are four times the next smaller


class NativeModel:
    """The model and its running sequences on one rank.

    Args:
        decoder: with weights and cache.
        max_sequences: decoded together.
        max_prefill_tokens: fed in one pass of a prefill.
        graphs: whether decode steps run as CUDA graphs.

    Attributes:
        logits: of the last step, one row per sequence at home here that got a token, in one or two tensors; the next
            step may overwrite them.
        sampled: these sequences, in the same order.
        max_rows: of a step, if the sequences are dealt evenly to the ranks that have rows of their own.
        recording: takes the routes of every pass, where they are recorded.
    """

    can_merge = True
    can_pad = True

    def __init__(self, decoder: Decoder, max_sequences: int, max_prefill_tokens: int, graphs: bool) -> None:
        self.decoder, self.max_sequences, self.max_prefill_tokens = decoder, max_sequences, max_prefill_tokens
        cache = decoder.cache
        self.cache_size = CacheSize(cache.num_tokens // cache.page_size, cache.page_size)
        self.max_context = min(len(decoder.rotary), cache.num_tokens)
        ranks = decoder.ranks
        self._ranks = ranks if ranks is not None and ranks.splits_rows else None
        self._num_homes, self._own_home = 1, 0
        if self._ranks is not None:
            self._num_homes, self._own_home = self._ranks.group.world_size, self._ranks.group.rank
        self.max_rows = -(-max_sequences // self._num_homes)
        self.logits: list[torch.Tensor] = []
        self.sampled: list[int] = []
        self.recording: RouteRecording | None = None
        self._prompts: dict[int, Admission] = {}  # of sequences that don't decode yet
        self._sequences: dict[int, RunningSequence] = {}
        self._rows: dict[tuple[int, int], Rows] = {}
        self._filled: Rows | None = None  # rows that hold the running sequences as they stand
        self._unknown: NewTokens | None = None  # of the step launched last, if they are not known yet
        self._graphs: dict[tuple[int, int, bool], GraphedStep] | None = {} if graphs else None
        self._sampler = Sampler()  # chooses again for sequences that ask for more than the step's own sampling
        self._replayed: ReplayedRoutes | ReplayedIds | None = None
        self._steps = 0  # since the load was taken
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    @property
    def running(self) -> list[int]:
        """Numbers of the sequences that decode, in the order in which they came to."""
        return list(self._sequences)

    def launch(self, step: StepPlan) -> NewTokens:
        """Begin a step; on a GPU it goes on by itself."""
        self._retire(step.retire)
        self._admit(step.admit)
        self._grow(step.grow)
        decoding = dict(self._sequences) if step.decode else {}
        self.logits, self.sampled = [], []
        new = NewTokens(self.decoder.rotary.device)
        started = self._feed(step.feed, new) if step.feed else {}
        if decoding:
            self._decode(decoding, new)
        if started:
            self._sequences |= started
            self._filled = None
        if self._ranks is not None and (started or decoding):
            new.share(self._by_home(started | decoding), self.decoder.shape.vocabulary, self._ranks.gather)
        new.copy()
        self._unknown = new
        return new

    def _by_home(self, sequences: Mapping[int, RunningSequence]) -> list[dict[int, RunningSequence]]:
        """The sequences that each rank has rows for; all in one where all ranks have."""
        if self._ranks is None:
            return [dict(sequences)]
        held: list[dict[int, RunningSequence]] = [{} for _ in range(self._num_homes)]
        for number, sequence in sequences.items():
            held[sequence.home][number] = sequence
        return held

    def _mine(self, sequences: Mapping[int, RunningSequence]) -> dict[int, RunningSequence]:
        """Those that this rank has rows for."""
        return self._by_home(sequences)[self._own_home]

    def _holds(self, home: int) -> bool:
        return self._ranks is None or self._ranks.holds(home)

    def _admit(self, admissions: Sequence[Admission]) -> None:
        for admission in admissions:
            self._prompts[admission.sequence] = admission
            sampling = admission.sampling
            if self._holds(admission.home) and (sampling.changes_logits or sampling.logprobs is not None):
                self._sampler.admit(admission)

    def _retire(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            if self._sequences.pop(sequence, None) is not None:
                self._filled = None
            self._prompts.pop(sequence, None)
        self._sampler.retire(sequences)

    def _grow(self, grow: Sequence[tuple[int, int]]) -> None:
        """Add pages to sequences, and to their rows, if these are laid out."""
        grow = [(number, page) for number, page in grow if self._holds(self._sequences[number].home)]
        columns = []
        for number, page in grow:
            columns.append(len(self._sequences[number].pages))
            self._sequences[number].pages.append(page)
        if grow and self._filled is not None:
            width = self._filled.page_table.shape[1]
            rows_of = {number: [row] for row, number in enumerate(self._mine(self._sequences))}
            rows_of[next(iter(rows_of))] += range(len(rows_of), len(self._filled.tokens))  # padding repeats the first
            # A row that outgrows its table is laid out again, in a wider one.
            new = [
                (row, column, page)
                for (number, page), column in zip(grow, columns, strict=True)
                if column < width
                for row in rows_of[number]
            ]
            if new:
                self._filled.set_pages(*zip(*new, strict=True))

    @torch.inference_mode()
    def _feed(self, pieces: Sequence[Piece], new: NewTokens) -> dict[int, RunningSequence]:
        """Feed pieces of prompts; the sequences whose prompts end."""
        hidden = prefill(self.decoder, self._prompts, pieces, self.max_prefill_tokens, self.recording)
        started: dict[int, RunningSequence] = {}
        for piece in pieces:
            if piece.stop == len(self._prompts[piece.sequence].tokens):
                admission = self._prompts.pop(piece.sequence)
                pages = list(admission.pages)
                position, sampling = len(admission.tokens), admission.sampling
                started[piece.sequence] = RunningSequence(pages, position, 0, sampling, admission.home)
        mine = self._mine(started)
        if not mine:
            return started
        logits = linear(hidden, self.decoder.weights.head)
        self.logits.append(logits)
        self.sampled += mine
        rows = Rows.empty(len(mine), 1, hidden.device)
        rows.fill(list(mine.values()))
        chosen = sample(logits, rows.temperature, rows.seeds, rows.positions, rows.top_p)
        chosen = chosen.where(logits.amax(dim=-1).isfinite(), NO_TOKEN)
        self._sampler.choose_again(list(mine), logits, chosen)
        new.add(mine, chosen, *self._sampler.take_in(list(mine), logits, chosen))
        return started

    def _decode(self, decoding: Mapping[int, RunningSequence], new: NewTokens) -> None:
        """Feed every sequence's newest token; ranks with rows of their own take a step of the same size."""
        by_home = self._by_home(decoding)
        mine = by_home[self._own_home]
        numbers, running = list(mine), list(mine.values())
        most = max(map(len, by_home))
        num_rows = bucket_of(most, max(most, self.max_rows))
        num_pages = self._num_pages(max(sequence.position for sequence in decoding.values()) + 1)
        nucleus = any(each.sampling.top_p < 1 and not each.sampling.changes_logits for each in decoding.values())
        step = self._step(num_rows, num_pages, nucleus)
        rows = self._rows[num_rows, num_pages]
        if rows is not self._filled or not running:
            if running and self._unknown is not None:
                self._unknown()
            rows.fill(running)
            self._filled = rows
        if self._replayed is not None:
            self._replayed.advance()
        logits, sampled = step()[: len(running)], rows.sampled[: len(running)]
        self.logits.append(logits)
        self.sampled += numbers
        if self.recording is not None:
            fed = [Fed(number, each.position, 1) for held in by_home for number, each in held.items()]
            self.recording.keep(fed, *without_padding(step.routes, [len(held) for held in by_home], num_rows))
        if self._sampler.choose_again(numbers, logits, sampled):
            rows.feed_sampled(len(running))
        new.add(mine, sampled, *self._sampler.take_in(numbers, logits, sampled))
        self._steps += 1
        for sequence in decoding.values():
            sequence.position += 1

    def take_load(self) -> Load | None:
        """Work of this rank's slots since the last call."""
        if self.decoder.load is None:
            return None
        pairs, active = (totals[:, None] for totals in self.decoder.load.take())
        steps, self._steps = self._steps, 0
        return Load(pairs, active, steps)

    def replay(self, routes: torch.Tensor | None) -> None:
        """Take the experts of the next decode steps from routes ``[S, L, T, K]``; None ends that."""
        num_rows = self.max_sequences
        if routes is not None and self._ranks is None:
            num_rows = bucket_of(routes.shape[2], self.max_rows)
        self._replayed = replay(self.decoder, routes, num_rows)
        if self._graphs is not None:
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # the old one goes with the last graph of it

    def capture(self) -> None:
        """Capture the steps of all sizes with short contexts before they are needed."""
        for num_rows in self._sizes():
            self._step(num_rows, self._num_pages(1), False)

    def compile_steps(self) -> None:
        """Compile the kernels of these steps, whatever numbers the weights have by now."""
        for num_rows in self._sizes():
            rows = Rows.empty(num_rows, self._num_pages(1), self.decoder.rotary.device)
            EagerStep(self.decoder, rows, False)()
        if self._ranks is not None:
            self._ranks.gather(torch.zeros((1, 1), dtype=torch.int64, device=self.decoder.rotary.device))

    def _sizes(self) -> list[int]:
        """Rows of the captured steps, the most first: the smaller ones then fit into their memory."""
        return sorted({bucket_of(rows + 1, self.max_rows) for rows in range(self.max_rows)}, reverse=True)

    def _num_pages(self, tokens: int) -> int:
        """Columns of the page table for contexts of so many tokens."""
        size, columns = self.cache_size.page_size, LEAST_PAGES
        while columns * size < tokens:
            columns *= 4
        return min(columns, -(-self.max_context // size))

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

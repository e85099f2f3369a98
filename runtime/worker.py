"""One rank at work: its shard of the model, its sequences, and the steps rank 0 plans."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from placement.plan import PlacementPlan
from profiler.seam import MoELayer
from runtime.batch import CausalModel, SequenceBatch, plan_passes
from runtime.checkpoint import LoadReport
from runtime.context import Routes, StepContext
from runtime.distributed import RankGroup
from runtime.exchange import EXCHANGES, DispatchRule
from runtime.experts import ExpertShard
from runtime.load import DispatchLoad, Load
from runtime.logprobs import gather_logprobs
from runtime.recording import Fed
from runtime.requests import TokenLogprobs
from runtime.sampling import Sampler
from runtime.step_plan import Admission, Piece, StepPlan
from runtime.worker_interface import ModelFacts, Worker, eos_token_ids


class RankWorker(Worker):
    """Executes step plans on the universal path.

    Args:
        model: this rank's shard (from `load_shard` or `random_shard`).
        report: what the loader found.
        plan: the placement plan.
        group: all ranks; GPU g of the plan is rank g.
        exchange: ``allreduce`` (every rank holds every sequence) or ``alltoall`` (each its own).
    """

    def __init__(self, model: Any, report: LoadReport, plan: PlacementPlan, group: RankGroup, exchange: str) -> None:
        self.group, self.context = group, StepContext()
        self.model = CausalModel(model)
        self.facts = replace(model_facts(model), expert_bytes=_expert_bytes(report, plan, group.rank))
        self.everyone_holds_all = exchange == "allreduce"
        self.layers = report.layers
        # Only in ``alltoall`` can a rank be without sequences.
        self._empty_calls = [] if self.everyone_holds_all else _record_empty_calls(self.model, self.layers)
        self._load = DispatchLoad(plan, exchange, self.context, group.device) if group.rank == 0 else None
        install_shards(report, plan, group, exchange, self.context, self._load)
        self.homes: dict[int, int] = {}  # every sequence that decodes, in the order in which they came to
        self.last_token: dict[int, int] = {}
        self._prompts: dict[int, Admission] = {}  # of the sequences that don't yet
        self._begun: dict[int, SequenceBatch] = {}  # of those that this rank holds, whose prompts are fed in pieces
        self._sampler = Sampler()
        self._asked: dict[int, int] = {}  # how many log-probabilities each sequence wants with its tokens
        self._logprobs: dict[int, TokenLogprobs] = {}
        self._batch: SequenceBatch | None = None

    def replay(self, routes: torch.Tensor | None) -> None:
        """Take routes as given; see `Worker.replay`."""
        self.context.forced_routes = None if routes is None else _Replay(routes)

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the last step's tokens; see `Worker.logprobs`."""
        return self._logprobs

    def take_load(self) -> Load | None:
        """What rank 0 saw dispatched; see `Worker.take_load`."""
        return None if self._load is None else self._load.take()

    def _end_pass(self, decoding: bool) -> None:
        if self._load is not None:
            self._load.end_pass(decoding)

    def execute(self, step: StepPlan) -> dict[int, int]:
        """Run one step; see `Worker.execute`."""
        self._logprobs = {}
        self._retire(step.retire)
        decoding = dict(self.homes) if step.decode else {}
        self._admit(step.admit)
        started: dict[int, int] = {}
        sampled: dict[int, int] = {}
        joining: list[SequenceBatch] = []
        for pieces in self._passes(step.feed):
            sampled |= self._feed(pieces, joining)
            self._end_pass(decoding=False)
            homes = {piece.sequence: self._prompts[piece.sequence].home for piece in pieces}
            self._record((Fed(p.sequence, p.start, p.stop - p.start) for p in pieces), homes)
            for piece in pieces:
                if piece.stop == len(self._prompts[piece.sequence].tokens):
                    started[piece.sequence] = self._prompts.pop(piece.sequence).home
        if decoding:
            self._count_tokens(dict.fromkeys(decoding, 1), decoding)
            sampled |= self._decode()
            self._end_pass(decoding=True)
            self._record((Fed(sequence, None, 1) for sequence in decoding), decoding)
        for batch in joining:
            self._join(batch)
        self.homes |= started
        taking_part = started | decoding
        tokens = self._share(sampled, taking_part) if taking_part else {}
        self._share_logprobs(taking_part)
        self.last_token.update(tokens)
        return tokens

    def _holds(self, home: int) -> bool:
        return self.everyone_holds_all or home == self.group.rank

    def _admit(self, admissions: list[Admission]) -> None:
        for admission in admissions:
            self._prompts[admission.sequence] = admission
            self._sampler.admit(admission)
            if admission.sampling.logprobs is not None:
                self._asked[admission.sequence] = admission.sampling.logprobs

    def _retire(self, sequences: list[int]) -> None:
        held: list[dict[int, Any]] = [self.homes, self.last_token, self._asked, self._prompts, self._begun]
        for sequence, of_sequences in itertools.product(sequences, held):
            of_sequences.pop(sequence, None)
        self._sampler.retire(sequences)
        if self._batch is not None and sequences:
            rows = [row for row, sequence in enumerate(self._batch.sequences) if sequence in self.homes]
            if not rows:
                self._batch = None
            elif len(rows) < len(self._batch.sequences):
                self._batch.keep(rows)

    def _count_tokens(self, lengths: dict[int, int], homes: dict[int, int]) -> None:
        self.context.tokens_per_rank = [0] * self.group.world_size
        for sequence, length in lengths.items():
            self.context.tokens_per_rank[homes[sequence]] += length
        self.context.kept_routes = None if self.recording is None else []

    def _record(self, fed: Iterable[Fed], homes: dict[int, int]) -> None:
        """Hand over the routes of the pass that was run, where they are recorded."""
        if self.recording is not None and self.context.kept_routes:
            experts, weights = zip(*self.context.kept_routes, strict=True)
            self.recording.keep(sorted(fed, key=lambda tokens: homes[tokens.sequence]), experts, weights)

    def _passes(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Which pieces are fed together; sequences that cannot join others later come together."""
        return plan_passes(pieces, self._prompts) if self.model.can_merge or not pieces else [pieces]

    def _feed(self, pieces: list[Piece], joining: list[SequenceBatch]) -> dict[int, int]:
        """One pass over pieces: of whole prompts, or one that is not; batches whose prompts it ends are to join."""
        homes = {piece.sequence: self._prompts[piece.sequence].home for piece in pieces}
        self._count_tokens({piece.sequence: piece.stop - piece.start for piece in pieces}, homes)
        mine = [piece for piece in pieces if self._holds(homes[piece.sequence])]
        if not mine:
            return self._take_part_idle()
        admissions = [self._prompts[piece.sequence] for piece in mine]
        first, admission = mine[0], admissions[0]
        whole = first.stop == len(admission.tokens)
        if first.start:
            batch = self._begun.pop(first.sequence)
            tokens = self.model.go_on(batch, admission.tokens[first.start : first.stop])
        else:
            prompts = [each.tokens[: piece.stop] for each, piece in zip(admissions, mine, strict=True)]
            batch, tokens = self.model.start([piece.sequence for piece in mine], prompts)
        padded = len({piece.stop - piece.start for piece in mine}) > 1
        self.context.valid = batch.mask.bool().flatten() if padded else None
        logits = self.model.run(batch, tokens)
        if not whole:
            self._begun[first.sequence] = batch
            return {}
        joining.append(batch)
        return self._sample(batch.sequences, logits)

    def _join(self, batch: SequenceBatch) -> None:
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.absorb(batch)

    def _decode(self) -> dict[int, int]:
        if self._batch is None:
            return self._take_part_idle()
        self.context.valid = None
        sequences = self._batch.sequences
        logits = self.model.decode(self._batch, [self.last_token[sequence] for sequence in sequences])
        return self._sample(sequences, logits)

    @torch.inference_mode()
    def _take_part_idle(self) -> dict[int, int]:
        """Without sequences of its own a rank still serves its experts to the others, layer by layer."""
        self.context.valid = None
        for layer, arguments in zip(self.layers, self._empty_calls, strict=True):
            layer.experts.forward(*arguments)
        return {}

    def _sample(self, sequences: list[int], logits: torch.Tensor) -> dict[int, int]:
        if self.everyone_holds_all and self.group.rank != 0:
            return {}
        tokens, logprobs = self._sampler.choose(sequences, logits)
        self._logprobs |= logprobs
        return tokens

    def _share(self, sampled: dict[int, int], homes: dict[int, int]) -> dict[int, int]:
        """Every rank learns the new tokens."""
        if self.everyone_holds_all:
            tokens = torch.tensor([sampled.get(sequence, 0) for sequence in homes])
            return dict(zip(homes, self.group.broadcast_tokens(tokens).tolist(), strict=True))
        by_rank = [[seq for seq, home in homes.items() if home == rank] for rank in range(self.group.world_size)]
        mine = torch.zeros(max(map(len, by_rank)), dtype=torch.int64)
        mine[: len(sampled)] = torch.tensor([sampled[seq] for seq in by_rank[self.group.rank]], dtype=torch.int64)
        rows = self.group.gather_tokens(mine).tolist()
        found = {
            seq: row[place] for members, row in zip(by_rank, rows, strict=True) for place, seq in enumerate(members)
        }
        return {sequence: found[sequence] for sequence in homes}

    def _share_logprobs(self, homes: dict[int, int]) -> None:
        """Rank 0 learns the log-probabilities of this step's tokens."""
        asked = {sequence: self._asked[sequence] for sequence in homes if sequence in self._asked}
        if asked and not self.everyone_holds_all:
            self._logprobs = gather_logprobs(self.group, self._logprobs, asked, homes)


class _Replay:
    """Replaces the ids of every layer's routes, and goes to the next step with the first layer."""

    def __init__(self, routes: torch.Tensor) -> None:
        self._steps = iter(routes)
        self._ids = routes[0]

    def __call__(self, layer: int, routes: Routes) -> Routes:
        if layer == 0:
            self._ids = next(self._steps).to(routes[0].device)
        return self._ids[layer].to(routes[0].dtype), routes[1]


def _record_empty_calls(model: CausalModel, layers: list[MoELayer]) -> list[tuple[torch.Tensor, ...]]:
    """Arguments of every layer's experts for no tokens, cut from one pass without experts.

    No configuration gives their width and dtypes: some families project tokens to a latent width first, some weigh in
    float32.
    """
    calls: dict[int, tuple[torch.Tensor, ...]] = {}

    def record(layer_id: int, hidden: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
        calls[layer_id] = tuple(tensor[:0].clone() for tensor in (hidden.reshape(-1, hidden.shape[-1]), *routes))
        return torch.zeros_like(hidden)

    for layer in layers:
        layer.experts.forward = functools.partial(record, layer.layer_id)
    model.prefill([0], [[0]])
    return [calls[layer.layer_id] for layer in layers]


def _expert_bytes(report: LoadReport, plan: PlacementPlan, rank: int) -> int | None:
    """Bytes of one expert in one layer, from a layer that this rank holds any of."""
    for layer in report.layers:
        slots = len(plan.slots[plan.layer_ids.index(layer.layer_id)][rank])
        if slots:
            return sum(parameter.nbytes for parameter in layer.experts.parameters()) // slots
    return None


def model_facts(model: Any) -> ModelFacts:
    """What a Transformers model's configuration says of it."""
    config = model.config.get_text_config()
    context = int(getattr(config, "max_position_embeddings", None) or 4096)
    eos = eos_token_ids(getattr(model, "generation_config", None), model.config)
    return ModelFacts("universal", config.vocab_size, model.dtype, context, eos)


def local_slots(plan: PlacementPlan, rank: int) -> dict[int, tuple[int, ...]]:
    """Logical ids of one rank's slots, by decoder layer."""
    return {layer: plan.slots[index][rank] for index, layer in enumerate(plan.layer_ids)}


def install_shards(
    report: LoadReport,
    plan: PlacementPlan,
    group: RankGroup,
    exchange: str,
    context: StepContext,
    load: DispatchLoad | None = None,
) -> None:
    """Give every experts module of the model its sharded forward, whose dispatch ``load`` watches."""
    mode = EXCHANGES[exchange](group)
    position = {layer: index for index, layer in enumerate(plan.layer_ids)}
    for layer in report.layers:
        index = position[layer.layer_id]
        slot_of_expert = torch.full((plan.num_experts,), -1)
        for slot, expert in enumerate(plan.slots[index][group.rank]):
            slot_of_expert[expert] = slot
        copies = torch.as_tensor(plan.copies(index)).long().to(group.device)
        rule = DispatchRule(copies, group.world_size, plan.dispatch.split_above_tokens)
        if load is not None:
            rule = load.watch(index, rule)
        shard = ExpertShard(index, slot_of_expert.to(group.device), rule, mode, context, group.rank)
        shard.install(layer.experts)

"""Feeding prompts: passes of bounded size, in which sequences at the same place of their prompts attend together.

Shape legend: N sequences, L tokens of each, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest

import torch

from kernels.route import Routes
from runtime.native.forward import Decoder, run_layers
from runtime.native.mla import LatentCache, attend_prompts
from runtime.native.prefill_attention import EXPANDED, prefill_attention
from runtime.recording import Fed, RouteRecording
from runtime.step_plan import Admission, Piece


def plan_passes(pieces: Sequence[Piece], max_tokens: int) -> list[list[Piece]]:
    """Spread pieces over passes of at most so many tokens, in order; a pass has at most one piece of a sequence."""
    passes: list[list[Piece]] = [[]]
    free = max_tokens
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            if free == 0:
                passes.append([])
                free = max_tokens
            stop = min(piece.stop, start + free)
            passes[-1].append(Piece(piece.sequence, start, stop))
            free -= stop - start
            start = stop
    return passes


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    prompts: Mapping[int, Admission],
    pieces: Sequence[Piece],
    max_tokens: int,
    recording: RouteRecording | None = None,
) -> torch.Tensor:
    """Feed pieces of prompts.

    Where ranks have rows of their own, each feeds the pieces of the sequences at home there, and all make as many
    passes of as many rows; what a rank lacks is padding.

    Args:
        decoder: the model, into whose cache keys and values go.
        prompts: by sequence, with their pages.
        pieces: at most one of a sequence; the same on every rank.
        max_tokens: fed in one pass.
        recording: takes the routes of every pass, where they are recorded.

    Returns:
        Hidden states of the last tokens of this rank's prompts that end, in the order of their pieces, after the last
        norm, ``[prompts that end, D]``.
    """
    by_rank, rank = _split(decoder, prompts, pieces)
    ending = [piece.sequence for piece in by_rank[rank] if piece.stop == len(prompts[piece.sequence].tokens)]
    last = decoder.weights.norm.new_empty((len(ending), decoder.shape.width))
    passes = (plan_passes(held, max_tokens) for held in by_rank)
    for together in zip_longest(*passes, fillvalue=[]):
        grouped = [_group(held) for held in together]
        ordered = [[piece for group in groups for piece in group] for groups in grouped]
        counts = [sum(piece.stop - piece.start for piece in held) for held in ordered]
        if recording is None:
            hidden = _run_pass(decoder, prompts, grouped[rank], max(counts))
        else:
            with decoder.keep_routes() as routes:
                hidden = _run_pass(decoder, prompts, grouped[rank], max(counts))
            fed = [Fed(piece.sequence, piece.start, piece.stop - piece.start) for held in ordered for piece in held]
            recording.keep(fed, *without_padding(routes, counts, max(counts)))
        ends = torch.tensor([piece.stop - piece.start for piece in ordered[rank]], dtype=torch.int64).cumsum(0) - 1
        done = [i for i, piece in enumerate(ordered[rank]) if piece.stop == len(prompts[piece.sequence].tokens)]
        if done:
            last[[ending.index(ordered[rank][i].sequence) for i in done]] = hidden[ends[done].to(hidden.device)]
    return last


def _split(
    decoder: Decoder, prompts: Mapping[int, Admission], pieces: Sequence[Piece]
) -> tuple[list[list[Piece]], int]:
    """The pieces that each rank feeds, and which of these are this rank's."""
    ranks = decoder.ranks
    if ranks is None or not ranks.splits_rows:
        return [list(pieces)], 0
    homes = range(ranks.group.world_size)
    return [[each for each in pieces if prompts[each.sequence].home == home] for home in homes], ranks.group.rank


def without_padding(
    routes: Sequence[Routes], counts: Sequence[int], num_rows: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Experts and weights of every MoE layer ``[S, K]``.

    Args:
        routes: of every MoE layer; of all ranks' rows where there are several counts.
        counts: of each rank's rows, how many at their beginning are not padding.
        num_rows: of each rank.
    """
    ids, weights = [each.ids for each in routes], [each.weights for each in routes]
    if len(counts) > 1:
        real = torch.cat([torch.arange(count) + rank * num_rows for rank, count in enumerate(counts)])
        real = (real.pin_memory() if ids[0].is_cuda else real).to(ids[0].device, non_blocking=True)
        ids, weights = [each[real] for each in ids], [each[real] for each in weights]
    return ids, weights


def _group(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces with the same start and stop together."""

    def place(piece: Piece) -> tuple[int, int]:
        return piece.start, piece.stop

    return [list(group) for _, group in groupby(sorted(pieces, key=place), place)]


def _run_pass(
    decoder: Decoder, prompts: Mapping[int, Admission], groups: list[list[Piece]], num_rows: int
) -> torch.Tensor:
    """Hidden states of the groups' tokens, and of padding up to so many rows."""
    device, page_size = decoder.rotary.device, decoder.cache.page_size
    tokens, positions = [], []
    cached = []  # per group, where the tokens so far of its sequences are cached, [N, S]
    for group in groups:
        start, stop = group[0].start, group[0].stop
        place = torch.arange(stop)
        pages = torch.tensor([prompts[piece.sequence].pages[: -(-stop // page_size)] for piece in group])
        cached.append((pages[:, place // page_size] * page_size + place % page_size).to(device))
        tokens += [token for piece in group for token in prompts[piece.sequence].tokens[start:stop]]
        positions += list(range(start, stop)) * len(group)
    padding = num_rows - len(tokens)
    nowhere = torch.full((padding,), -1, device=device)
    new = [index[:, group[0].start :].flatten() for index, group in zip(cached, groups, strict=True)]

    def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
        sizes = [len(group) * (group[0].stop - group[0].start) for group in groups]
        outputs = []
        for queries, index, group in zip(q[: num_rows - padding].split(sizes), cached, groups, strict=True):
            attended = _attend(decoder, layer, queries.unflatten(0, (len(group), -1)), index)
            outputs.append(attended.flatten(0, 1))
        if padding:
            outputs.append(q.new_zeros((padding, q.shape[1], decoder.shape.value_size)))
        return torch.cat(outputs)

    return run_layers(
        decoder,
        torch.tensor(tokens + [0] * padding, device=device),
        torch.tensor(positions + [0] * padding, dtype=torch.int32, device=device),
        torch.cat([*new, nowhere]),
        attend,
    )


def _attend(decoder: Decoder, number: int, q: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A layer's attention from queries ``[N, L, H, d]`` to what is cached at ``index [N, S]``, ``[N, L, H, …]``."""
    shape, layer, cache = decoder.shape, decoder.weights.layers[number], decoder.cache
    at_once = max(1, EXPANDED // (index.shape[1] * shape.kv_values_per_layer))  # sequences
    if len(index) > at_once:
        parts = zip(q.split(at_once), index.split(at_once), strict=True)
        return torch.cat([_attend(decoder, number, *part) for part in parts])
    if isinstance(cache, LatentCache):
        return attend_prompts(shape, layer, q, cache.latents[number].flatten(0, 1)[index])
    keys, values = cache.keys[number].flatten(0, 1)[index], cache.values[number].flatten(0, 1)[index]
    return prefill_attention(q, keys, values, shape.scale, shape.windows[number], layer.sinks)

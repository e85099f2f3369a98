"""Feeding prompts: passes of bounded size, in which sequences at the same place of their prompts attend together.

Shape legend: N sequences, L tokens of each, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

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

    Args:
        decoder: the model, into whose cache keys and values go.
        prompts: by sequence, with their pages.
        pieces: at most one of a sequence.
        max_tokens: fed in one pass.
        recording: takes the routes of every pass, where they are recorded.

    Returns:
        Hidden states of the last tokens of the prompts that end, in the order of their pieces, after the last norm,
        ``[prompts that end, D]``.
    """
    ending = [piece.sequence for piece in pieces if piece.stop == len(prompts[piece.sequence].tokens)]
    last = decoder.weights.norm.new_empty((len(ending), decoder.shape.width))
    for together in plan_passes(pieces, max_tokens):
        groups = _group(together)
        ordered = [piece for group in groups for piece in group]
        if recording is None:
            hidden = _run_pass(decoder, prompts, groups)
        else:
            with decoder.keep_routes() as routes:
                hidden = _run_pass(decoder, prompts, groups)
            fed = [Fed(piece.sequence, piece.start, piece.stop - piece.start) for piece in ordered]
            recording.keep(fed, [each.ids for each in routes], [each.weights for each in routes])
        ends = torch.tensor([piece.stop - piece.start for piece in ordered]).cumsum(0) - 1
        done = [i for i, piece in enumerate(ordered) if piece.stop == len(prompts[piece.sequence].tokens)]
        if done:
            last[[ending.index(ordered[i].sequence) for i in done]] = hidden[ends[done].to(hidden.device)]
    return last


def _group(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces with the same start and stop together."""

    def place(piece: Piece) -> tuple[int, int]:
        return piece.start, piece.stop

    return [list(group) for _, group in groupby(sorted(pieces, key=place), place)]


def _run_pass(decoder: Decoder, prompts: Mapping[int, Admission], groups: list[list[Piece]]) -> torch.Tensor:
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
    new = torch.cat([index[:, group[0].start :].flatten() for index, group in zip(cached, groups, strict=True)])

    def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
        sizes = [len(group) * (group[0].stop - group[0].start) for group in groups]
        outputs = []
        for queries, index, group in zip(q.split(sizes), cached, groups, strict=True):
            attended = _attend(decoder, layer, queries.unflatten(0, (len(group), -1)), index)
            outputs.append(attended.flatten(0, 1))
        return torch.cat(outputs)

    return run_layers(
        decoder,
        torch.tensor(tokens, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        new,
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

"""A scheduler that runs requests as SGLang does, to record their tokens: chunks, mixed passes, padded decode steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.engine_recordings import DECODE, EXTEND, IDLE, MIXED, token_record


@dataclass
class Request:
    """One request: slots ``[T, L, K]`` of all tokens that are fed, the first ``prompt`` of them in prefill."""

    slots: np.ndarray
    token_ids: np.ndarray
    prompt: int
    fed: int = 0


def run_requests(
    requests: list[Request], layer_ids: list[int], map_shape: tuple[int, int], *, budget: int, mixed: bool, padding: int
) -> list[dict[str, Any]]:
    """Records of all passes. Prefill goes first; a prompt beyond the budget is cut, and goes on in the next pass.

    Args:
        requests: in the order they arrive, two before every prefill pass.
        layer_ids: MoE layers.
        map_shape: ``[R, P]`` of the map of slots.
        budget: tokens of a prefill pass.
        mixed: whether running requests decode within prefill passes.
        padding: decode passes hold a multiple of so many tokens.
    """
    waiting, running, records = list(requests), [], []  # type: list[Request], list[Request], list[dict[str, Any]]
    chunked: Request | None = None

    def record(mode: int, parts: list[tuple[Request, int]], pad: int = 0) -> None:
        taken = [(request, slice(request.fed, request.fed + length)) for request, length in parts]
        slots = np.concatenate([request.slots[tokens] for request, tokens in taken])
        ids = np.concatenate([request.token_ids[tokens] for request, tokens in taken]).tolist()
        positions = np.concatenate([np.arange(tokens.start, tokens.stop) for _, tokens in taken]).tolist()
        lengths = None if mode == DECODE else [length for _, length in parts]
        records.append(
            token_record(
                len(records), mode, ids + [0] * pad, positions + [0] * pad, slots, layer_ids, map_shape, lengths
            )
        )
        for request, length in parts:
            request.fed += length

    while waiting or running or chunked is not None:
        if waiting or chunked is not None:
            admitted = [] if chunked is None else [chunked]
            admitted += [waiting.pop(0) for _ in range(min(2, len(waiting)))]
            left, parts = budget, []
            for request in admitted:
                length = min(request.prompt - request.fed, left)
                parts += [(request, length)] if length else []
                left -= length
            waiting[:0] = admitted[len(parts) :]
            last, length = parts[-1]
            chunked = last if last.fed + length < last.prompt else None
            decoding = [(request, 1) for request in running] if mixed else []
            record(MIXED if decoding else EXTEND, parts + decoding)
            running = [request for request in running if request.fed < len(request.slots)]
            running += [request for request, _ in parts if request is not chunked and request.fed < len(request.slots)]
        else:
            record(DECODE, [(request, 1) for request in running], -len(running) % padding)
            running = [request for request in running if request.fed < len(request.slots)]
    empty = np.zeros((0, len(layer_ids), 1), int)
    records.append(token_record(len(records), IDLE, [], [], empty, layer_ids, map_shape))
    return records

"""Into how many parts decode attention divides a context, and the counters by which the last part knows itself."""

from __future__ import annotations

import functools

import torch

MAX_SPLITS = 64
MAX_TOKENS_PER_SPLIT = 4096
INTERPRETER_SMS = 4  # the interpreter has no GPU to ask; few programs keep it fast
COUNTERS = 1 << 16

_counters: dict[torch.device, torch.Tensor] = {}


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_SMS


def choose_splits(pairs: int, reach: int, block: int, programs_per_sm: int, device: torch.device) -> int:
    """Splits of every context, from shapes alone.

    Enough to fill the GPU; and none longer than 4096 tokens, so that one long context among short ones is spread too.

    Args:
        pairs: sequences times key/value heads, each of which is split.
        reach: the most tokens that any sequence can attend to.
        block: tokens a program takes at a time.
        programs_per_sm: programs that a multiprocessor holds.
        device: whose multiprocessors are to be filled.
    """
    blocks = -(-reach // block)
    wanted = max(num_sms(device) * programs_per_sm // max(pairs, 1), -(-reach // MAX_TOKENS_PER_SPLIT), 1)
    return max(min(wanted, blocks, MAX_SPLITS), 1)


def arrival_counters(count: int, device: torch.device) -> torch.Tensor:
    """Zeros, int32, at least ``count``, which every launch leaves as zeros; kept, so that no launch has to clear them.

    One stream at a time may use them per device. While a graph is captured, nothing is kept that it allocates.
    """
    kept = _counters.get(device)
    if kept is not None and kept.numel() >= count:
        return kept
    fresh = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _counters[device] = fresh
    return fresh

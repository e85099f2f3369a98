"""How decode attention divides its work: tokens per step of a program, and parts of a context."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

MAX_SPLITS = 64
MAX_TOKENS_PER_SPLIT = 4096
INTERPRETER_SMS = 4  # the interpreter has no GPU to ask; few programs keep it fast


@dataclass(frozen=True)
class Tiles:
    """Tokens a program takes at a time, its warps and pipeline stages, how many fill a multiprocessor.

    A context is split into parts of ``least`` tokens or more.
    """

    block: int
    warps: int
    stages: int
    programs_per_sm: int
    least: int


def choose_tiles(head_size: int, dtype: torch.dtype) -> Tiles:
    """Tiles by the bytes of a token's key; measured on an H100 (docs/kernels/decode_attention.md)."""
    if head_size * dtype.itemsize <= 128:
        return Tiles(block=128, warps=4, stages=2, programs_per_sm=2, least=128)
    if head_size * dtype.itemsize <= 256:
        return Tiles(block=64, warps=4, stages=2, programs_per_sm=2, least=64)
    return Tiles(block=32, warps=4, stages=2, programs_per_sm=2, least=64)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_SMS


def choose_splits(pairs: int, reach: int, tiles: Tiles, device: torch.device) -> int:
    """Splits of every context, from shapes alone.

    Enough to fill the GPU; and none longer than 4096 tokens, so that one long context among short ones is spread too.

    Args:
        pairs: sequences times key/value heads, each of which is split.
        reach: the most tokens that any sequence can attend to.
        tiles: of the kernel.
        device: whose multiprocessors are to be filled.
    """
    filling = num_sms(device) * tiles.programs_per_sm // max(pairs, 1)
    wanted = max(filling, -(-reach // MAX_TOKENS_PER_SPLIT))
    return max(min(wanted, reach // tiles.least, MAX_SPLITS), 1)

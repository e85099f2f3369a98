"""The decode step: from each row's token to its next, eagerly or as a CUDA graph per size.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from kernels.decode_attention import decode_attention
from kernels.route import Routes
from kernels.sample import sample
from runtime.native.forward import Decoder, run_layers
from runtime.native.mla import LatentCache, attend_rows
from runtime.native.rows import Rows
from runtime.worker_interface import NO_TOKEN


@torch.inference_mode()
def decode_step(decoder: Decoder, rows: Rows, nucleus: bool) -> torch.Tensor:
    """Feed every row's token, sample the next ones, and leave the rows ready to feed these.

    Args:
        decoder: the model, into whose cache the tokens' keys and values go.
        rows: read and advanced in place; ``rows.sampled`` has the new tokens.
        nucleus: whether any row's ``top_p`` is below 1.

    Returns:
        Logits ``[B, V]`` after the tokens that were fed.
    """
    shape, cache = decoder.shape, decoder.cache
    lengths = rows.positions + 1

    def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
        if isinstance(cache, LatentCache):
            return attend_rows(shape, decoder.weights.layers[layer], q, cache.latents[layer], rows.page_table, lengths)
        return decode_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            rows.page_table,
            lengths,
            shape.scale,
            shape.windows[layer],
            decoder.weights.layers[layer].sinks,
        )

    hidden = run_layers(decoder, rows.tokens, rows.positions, rows.slot_index(cache.page_size), attend, decoding=True)
    logits = linear(hidden, decoder.weights.head)
    chosen = sample(logits, rows.temperature, rows.seeds, lengths, rows.top_p if nucleus else None)
    rows.tokens.copy_(chosen)
    rows.positions.copy_(lengths)
    rows.sampled.copy_(chosen.where(logits.amax(dim=-1).isfinite(), NO_TOKEN))
    return logits


class EagerStep:
    """One size of the decode step, run operator by operator.

    Args:
        decoder: the model.
        rows: of this size.
        nucleus: as in `decode_step`.

    Attributes:
        routes: of every MoE layer in the latest step.
    """

    def __init__(self, decoder: Decoder, rows: Rows, nucleus: bool) -> None:
        self._decoder, self._rows, self._nucleus = decoder, rows, nucleus
        self.routes: list[Routes] = []

    def __call__(self) -> torch.Tensor:
        """Take the step; logits ``[B, V]``."""
        with self._decoder.keep_routes() as self.routes:
            return decode_step(self._decoder, self._rows, self._nucleus)


class GraphedStep:
    """One size of the decode step, captured: the same rows and memory at every replay.

    Args:
        decoder: the model.
        rows: of this size; they must be filled again after capturing, which runs the step.
        nucleus: as in `decode_step`.
        pool: handle of the memory shared by graphs that never run at the same time.

    Attributes:
        routes: as of `EagerStep`: the graph's own tensors, which every replay fills, so that reading them costs the
            step nothing.
    """

    def __init__(self, decoder: Decoder, rows: Rows, nucleus: bool, pool: Any) -> None:
        rows.clear()
        # Compiles kernels and sets up libraries, which cannot be done while capturing; on the stream that prefill uses,
        # because the matrix library keeps a workspace for every stream that it has run on.
        decode_step(decoder, rows, nucleus)
        self._graph = torch.cuda.CUDAGraph()
        with decoder.keep_routes() as self.routes, torch.cuda.graph(self._graph, pool=pool):
            self.logits = decode_step(decoder, rows, nucleus)

    def __call__(self) -> torch.Tensor:
        """Replay; logits ``[B, V]``, overwritten by the next replay of any graph."""
        self._graph.replay()
        return self.logits

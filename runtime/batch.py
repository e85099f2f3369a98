"""One rank's running sequences, decoded together over a shared, left-padded cache.

The cache is Transformers' own, so every family works. Caches made of plain attention layers can be merged, so that a
new sequence joins the others; families with recurrent state can't, and their batches run to the end before the next.

Shape legend: B sequences, S cached positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from runtime.step_plan import Admission, Piece


class SequenceBatch:
    """Sequences with a common cache.

    Attributes:
        sequences: their numbers, one per row.
        mask: 1 where the cache holds a real token, int64 ``[B, S]``.
        cache: Transformers' cache, or None before the first pass.
    """

    def __init__(self, sequences: list[int], mask: torch.Tensor, cache: Any) -> None:
        self.sequences, self.mask, self.cache = sequences, mask, cache

    def keep(self, rows: list[int]) -> None:
        """Keep these rows, and drop the columns in which only dropped rows had tokens."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.sequences = [self.sequences[row] for row in rows]
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)
        if rows and is_mergeable(self.cache):
            empty = int(self.mask.any(dim=0).int().argmax())
            self.mask = self.mask[:, empty:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., empty:, :], layer.values[..., empty:, :]

    def absorb(self, other: SequenceBatch) -> None:
        """Append another batch's rows; the shorter cache is padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = length - self.mask.shape[1], length - other.mask.shape[1]
        self.sequences = [*self.sequences, *other.sequences]
        self.mask = torch.cat([pad(self.mask, (mine, 0)), pad(other.mask, (theirs, 0))])
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = _join(layer.keys, mine, joining.keys, theirs)
            layer.values = _join(layer.values, mine, joining.values, theirs)


def _join(first: torch.Tensor, first_padding: int, second: torch.Tensor, second_padding: int) -> torch.Tensor:
    """Keys or values ``[B, heads, S, width]`` of two batches, padded on the left of S."""
    return torch.cat([pad(first, (0, 0, first_padding, 0)), pad(second, (0, 0, second_padding, 0))])


def plan_passes(pieces: Sequence[Piece], prompts: Mapping[int, Admission]) -> list[list[Piece]]:
    """Which pieces are fed together: whole prompts, as far as padding at most doubles the work; others one by one."""
    passes: list[list[Piece]] = []
    together: list[int] = []  # lengths of the last pass's prompts, if they are whole
    for piece in pieces:
        length = piece.stop if piece.start == 0 and piece.stop == len(prompts[piece.sequence].tokens) else None
        longest = max([*together, length or 0])
        if length is not None and together and longest * (len(together) + 1) <= 2 * (sum(together) + length):
            passes[-1].append(piece)
            together.append(length)
        else:
            passes.append([piece])
            together = [] if length is None else [length]
    return passes


def is_mergeable(cache: Any) -> bool:
    """Whether every layer is a plain, full-length attention cache."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


class CausalModel:
    """A Transformers causal language model, called with what its family's forward takes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._accepts = set(inspect.signature(type(model).forward).parameters)
        self.can_merge = self._has_plain_attention()
        # A learned choice of positions to attend to goes wrong in padded rows, in Transformers' own batches too.
        self.can_pad = getattr(model.config.get_text_config(), "index_topk", None) is None

    def _has_plain_attention(self) -> bool:
        """Whether the family's layers all cache keys and values only (sliding windows may be cached in full)."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        layers = DynamicCache(config=self.model.config).layers
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def start(self, sequences: list[int], prompts: Sequence[Sequence[int]]) -> tuple[SequenceBatch, torch.Tensor]:
        """Lay prompts out together, padded on the left.

        Returns:
            The batch, with nothing cached yet, and the token ids ``[B, S]`` to `run` it with.
        """
        from transformers.cache_utils import DynamicCache

        length = max(len(prompt) for prompt in prompts)
        device = self.model.device
        tokens = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        return SequenceBatch(sequences, mask, DynamicCache() if self.can_merge else None), tokens

    def go_on(self, batch: SequenceBatch, tokens: Sequence[int]) -> torch.Tensor:
        """Append a prompt's next tokens to its batch of one sequence; the ids ``[1, new]`` to `run` it with."""
        batch.mask = pad(batch.mask, (0, len(tokens)), value=1)
        return torch.tensor([tokens], device=batch.mask.device)

    def prefill(self, sequences: list[int], prompts: Sequence[Sequence[int]]) -> tuple[SequenceBatch, torch.Tensor]:
        """Run prompts together.

        Returns:
            The batch, and float32 logits ``[B, V]`` after each prompt's last token.
        """
        batch, tokens = self.start(sequences, prompts)
        return batch, self.run(batch, tokens)

    def decode(self, batch: SequenceBatch, tokens: list[int]) -> torch.Tensor:
        """Feed one token per sequence; float32 logits ``[B, V]``."""
        batch.mask = pad(batch.mask, (0, 1), value=1)
        return self.run(batch, torch.tensor(tokens, device=batch.mask.device)[:, None])

    @torch.inference_mode()
    def run(self, batch: SequenceBatch, tokens: torch.Tensor) -> torch.Tensor:
        """Feed the batch's newest tokens ``[B, new]``, which its mask covers; float32 logits ``[B, V]`` of the last."""
        positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        arguments = {
            "input_ids": tokens,
            "attention_mask": batch.mask,
            "position_ids": positions,
            "past_key_values": batch.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        outputs = self.model(**{name: value for name, value in arguments.items() if name in self._accepts})
        batch.cache = outputs.past_key_values
        return outputs.logits[:, -1].float()

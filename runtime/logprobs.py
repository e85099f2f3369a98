"""Log-probabilities of chosen tokens and of the likeliest ones, and their way from the ranks that know them to rank 0.

They are of the model's own distribution: the log-softmax of its logits in float32, before whatever the request changes.

Shape legend: R rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.distributed import RankGroup
from runtime.requests import LEAST_LOGPROB, TokenLogprobs


def token_logprobs(
    logits_RV: torch.Tensor, tokens: Sequence[int], asked: Mapping[int, int]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of some rows.

    Args:
        logits_RV: of the model.
        tokens: chosen, by row.
        asked: how many of the likeliest tokens to name, by row.
    """
    rows = torch.tensor(list(asked), device=logits_RV.device)
    chosen = torch.tensor([tokens[row] for row in asked], device=logits_RV.device)
    logprobs = torch.log_softmax(logits_RV[rows].float(), dim=-1).clamp(min=LEAST_LOGPROB)
    most = min(max(asked.values()), logprobs.shape[1])
    values, ids = (found.tolist() for found in logprobs.topk(most, dim=-1))
    of_chosen = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    return {
        row: TokenLogprobs(of_chosen[place], tuple(zip(ids[place], values[place], strict=True))[:count])
        for place, (row, count) in enumerate(asked.items())
    }


def gather_logprobs(
    group: RankGroup, mine: Mapping[int, TokenLogprobs], asked: Mapping[int, int], homes: Mapping[int, int]
) -> dict[int, TokenLogprobs]:
    """Every rank's log-probabilities on every rank; all ranks call this with the same sequences.

    Args:
        group: all ranks.
        mine: of the sequences at home on this rank; one that has no token has none.
        asked: how many of the likeliest tokens each sequence names; not empty.
        homes: each sequence's rank.
    """
    members: list[list[int]] = [[] for _ in range(group.world_size)]
    for sequence in asked:
        members[homes[sequence]].append(sequence)
    width = 2 + 2 * max(asked.values())
    table = torch.zeros((max(map(len, members)), width), dtype=torch.float64)
    for row, sequence in zip(table, members[group.rank], strict=False):
        if sequence in mine:
            pairs = [number for pair in mine[sequence].top for number in pair]
            numbers = [1 + len(pairs) // 2, mine[sequence].chosen, *pairs]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    gathered = group.gather_tokens(table.flatten().view(torch.int64)).view(torch.float64)
    rows = gathered.view(group.world_size, -1, width).tolist()
    return {
        sequence: _unpack(row)
        for rank, held in enumerate(members)
        for sequence, row in zip(held, rows[rank], strict=False)
        if row[0] > 0
    }


def _unpack(row: Sequence[float]) -> TokenLogprobs:
    """Back from one row of the table: 1 + K, the chosen token's, then K pairs."""
    pairs = row[2 : 2 * int(row[0])]
    return TokenLogprobs(
        row[1], tuple((int(token), value) for token, value in zip(pairs[::2], pairs[1::2], strict=True))
    )

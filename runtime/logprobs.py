"""Log-probabilities of chosen tokens and of the likeliest ones, and their way to rank 0's host.

They are of the model's own distribution: the log-softmax of its logits in float32, before whatever the request changes.
On the way they are rows of numbers: how many pairs, the chosen token's, then pairs of a token id and its own.

Shape legend: R rows, V vocabulary, A sequences that ask, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.distributed import RankGroup
from runtime.requests import LEAST_LOGPROB, TokenLogprobs


def logprob_rows(logits_RV: torch.Tensor, chosen_R: torch.Tensor, asked: Mapping[int, int]) -> torch.Tensor:
    """Log-probabilities as numbers on the logits' device.

    Args:
        logits_RV: of the model.
        chosen_R: token ids, int64; those of rows without a token (below 0) count as token 0.
        asked: how many of the likeliest tokens to name, by row; not empty.

    Returns:
        float64 ``[A, 2 + 2K]``, in the order of ``asked``.
    """
    where = torch.tensor([list(asked), list(asked.values())])
    index, counts = (where.pin_memory() if logits_RV.is_cuda else where).to(logits_RV.device, non_blocking=True)
    logits_AV = logits_RV[index].float()
    greatest, ids = logits_AV.topk(min(max(asked.values()), logits_AV.shape[1]), dim=-1)
    of_chosen = logits_AV.gather(1, chosen_R[index].clamp(min=0)[:, None])
    logprobs = torch.cat((of_chosen, greatest), dim=1) - logits_AV.logsumexp(dim=-1, keepdim=True)
    logprobs = logprobs.clamp(min=LEAST_LOGPROB).double()
    pairs = torch.stack((ids.double(), logprobs[:, 1:]), dim=-1).flatten(1)
    return torch.cat((counts.clamp(max=ids.shape[1])[:, None].double(), logprobs[:, :1], pairs), dim=1)


def read_rows(sequences: Sequence[int], rows: torch.Tensor) -> dict[int, TokenLogprobs]:
    """What rows of numbers say, by sequence."""
    return {sequence: _read(row) for sequence, row in zip(sequences, rows.tolist(), strict=True)}


def gather_logprobs(
    group: RankGroup, mine: Mapping[int, TokenLogprobs], asked: Mapping[int, int], homes: Mapping[int, int]
) -> dict[int, TokenLogprobs]:
    """Every rank's log-probabilities on every rank; all ranks call this with the same sequences.

    Args:
        group: all ranks.
        mine: of the sequences at home on this rank.
        asked: how many of the likeliest tokens each sequence names; not empty.
        homes: each sequence's rank.
    """
    members: list[list[int]] = [[] for _ in range(group.world_size)]
    for sequence in asked:
        members[homes[sequence]].append(sequence)
    width = 2 + 2 * max(asked.values())
    rows = torch.zeros((max(map(len, members)), width), dtype=torch.float64)
    for row, sequence in zip(rows, members[group.rank], strict=False):
        pairs = [number for pair in mine[sequence].top for number in pair]
        row[: 2 + len(pairs)] = torch.tensor([len(pairs) // 2, mine[sequence].chosen, *pairs], dtype=torch.float64)
    gathered = group.gather_tokens(rows.flatten().view(torch.int64)).view(torch.float64)
    return {
        sequence: logprobs
        for held, of_rank in zip(members, gathered.unflatten(1, (-1, width)), strict=True)
        for sequence, logprobs in read_rows(held, of_rank[: len(held)]).items()
    }


def _read(row: Sequence[float]) -> TokenLogprobs:
    pairs = row[2 : 2 + 2 * int(row[0])]
    return TokenLogprobs(
        row[1], tuple((int(token), value) for token, value in zip(pairs[::2], pairs[1::2], strict=True))
    )

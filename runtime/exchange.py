"""Moving tokens to the ranks that hold their experts, and the results back.

Shape legend: T this rank's real tokens, S tokens of all ranks, K choices per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kernels.level_dispatch import dispatch_tokens
from runtime.context import Routes, StepContext
from runtime.distributed import RankGroup

# rows [N, D], GPU of every pair [N, K], logical ids [N, K], weights [N, K] -> this rank's share of the outputs, float32
# [N, D]. Shares travel and are summed in float32, so that in any dtype the sum hardly depends on the placement.
LocalExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DispatchRule:
    """The rule `level` for one layer of a plan.

    Args:
        copies: GPUs holding each expert, int64 ``[E, C]``, ascending, padded with -1.
        num_gpus: number of ranks.
        split_above_tokens: experts with more pairs in a step are split over their copies; None never splits.
    """

    def __init__(self, copies: torch.Tensor, num_gpus: int, split_above_tokens: int | None) -> None:
        self.copies, self.num_gpus, self.split_above_tokens = copies, num_gpus, split_above_tokens

    def __call__(self, experts: torch.Tensor) -> torch.Tensor:
        """GPU of every pair ``[S, K]`` of one step; needs the routes of all ranks."""
        return dispatch_tokens(experts, self.copies, self.num_gpus, self.split_above_tokens)


class Exchange(Protocol):
    """One of the exchange modes."""

    def __call__(
        self, hidden: torch.Tensor, routes: Routes, rule: DispatchRule, local: LocalExperts, context: StepContext
    ) -> torch.Tensor:
        """Outputs of the routed experts ``[T, D]`` for this rank's tokens ``hidden [T, D]``."""
        ...


class AllReduceExchange:
    """Every rank holds every token, computes its own experts' part, and the parts are summed."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group

    def __call__(
        self, hidden: torch.Tensor, routes: Routes, rule: DispatchRule, local: LocalExperts, context: StepContext
    ) -> torch.Tensor:
        if self.group.world_size > 1 and len(hidden):
            # One rank's routes count for all: a near-tie that falls differently on two ranks would silently drop a
            # pair or compute it twice.
            routes = _unpack_routes(self.group.broadcast(_pack_routes(*routes)), routes[1].dtype)
        context.keep(routes)
        experts, weights = routes
        partial = local(hidden, rule(experts), experts, weights)
        if self.group.world_size > 1 and len(hidden):
            partial = self.group.all_reduce(partial)
        return partial.to(hidden.dtype)


class AllToAllExchange:
    """Every rank holds its own sequences; a token travels once to each rank that serves one of its experts."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group

    def __call__(
        self, hidden: torch.Tensor, routes: Routes, rule: DispatchRule, local: LocalExperts, context: StepContext
    ) -> torch.Tensor:
        counts, rank, world = context.tokens_per_rank, self.group.rank, self.group.world_size
        experts, weights = self._gather_routes(routes, counts)
        context.keep((experts, weights))
        gpus = rule(experts)  # [S, K]
        needed = torch.stack([(gpus == gpu).any(dim=1) for gpu in range(world)])  # [G, S]
        source = torch.repeat_interleave(torch.arange(world), torch.tensor(counts)).to(gpus.device)  # [S]
        plan = torch.stack([(needed & (source == origin)).sum(dim=1) for origin in range(world)]).tolist()  # [from][to]
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        destination, token = needed[:, mine].nonzero(as_tuple=True)  # ordered by destination, then token
        received = self.group.all_to_all(hidden[token], plan[rank], [row[rank] for row in plan])
        served = needed[rank].nonzero().flatten()  # ordered by source rank, as the rows arrive
        partial = local(received, gpus[served], experts[served], weights[served])
        returned = self.group.all_to_all(partial, [row[rank] for row in plan], plan[rank])
        output = torch.zeros_like(hidden, dtype=torch.float32)
        for gpu in range(world):  # a fixed order of summation
            chosen = destination == gpu
            output[token[chosen]] += returned[chosen]
        return output.to(hidden.dtype)

    def _gather_routes(self, routes: Routes, counts: list[int]) -> Routes:
        """Routes of all ranks' tokens ``[S, K]``, in the order of the ranks."""
        packed = _pack_routes(*routes)
        padded = packed.new_zeros((max(counts), packed.shape[1]))
        padded[: len(packed)] = packed
        gathered = self.group.all_gather(padded)
        rows = torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)])
        return _unpack_routes(rows, routes[1].dtype)


def _pack_routes(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Ids and weights in one int32 tensor ``[T, 2K]``, so that one collective carries both."""
    return torch.cat([experts.int(), weights.float().view(torch.int32)], dim=1)


def _unpack_routes(packed: torch.Tensor, dtype: torch.dtype) -> Routes:
    num_choices = packed.shape[1] // 2
    return packed[:, :num_choices].long(), packed[:, num_choices:].contiguous().view(torch.float32).to(dtype)


EXCHANGES: dict[str, type[AllReduceExchange] | type[AllToAllExchange]] = {
    "allreduce": AllReduceExchange,
    "alltoall": AllToAllExchange,
}

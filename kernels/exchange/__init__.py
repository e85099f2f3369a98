"""Exchange between the GPUs of one host: rows go straight into the other GPUs' memory, in kernels that graphs capture.

All ranks call the same functions with the same numbers of rows in the same order. Sums are in the order of the ranks,
so their bits are the same on every rank.

Shape legend: T rows of a rank, K choices per row, G ranks, D model width.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.errors import OperatorError
from kernels.exchange.mailbox import Mailbox, open_mailbox
from kernels.launch import overlap, power_of_two
from kernels.route import Routes

__all__ = [
    "Mailbox",
    "collect",
    "dispatch",
    "gather",
    "gather_routes",
    "open_mailbox",
    "reduce_add_norm",
    "reduce_combine",
]

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PROGRAMS = 128  # at most; they must all run at the same time
TWO_WAY_BYTES = 1 << 17  # of all rows: from here on, with more than two ranks, rows are summed by one rank each


def reduce_add_norm(
    part: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, mailbox: Mailbox
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum every rank's part, add the residual, and normalise.

    Args:
        part: this rank's, bfloat16, float16 or float32 ``[T, D]``; all tensors are contiguous.
        residual: the same on every rank, like ``part``.
        norm_weight: ``[D]``.
        eps: added to the mean square.
        mailbox: of this rank.

    Returns:
        The sum and its norm ``[T, D]``, the same bits on every rank. The sum is float32 in the order of the ranks, then
        the residual, and rounded once (with more than two ranks and many rows also before the residual).

    Raises:
        OperatorError: the rows do not fit into the mailbox.
    """
    return _reduce(part, None, None, residual, norm_weight, eps, mailbox)


def reduce_combine(
    pairs: torch.Tensor,
    routes: Routes,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    mailbox: Mailbox,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.combine.combine` over all ranks: each rank's pairs are summed by weight, then the ranks' sums.

    Args:
        pairs: outputs of the pairs that this rank served ``[T·K, D]``; others may hold anything.
        routes: slots on this rank, and weights.
        shared: output of the shared experts, the same on every rank, like ``residual``; or None.
        residual: the same on every rank ``[T, D]``.
        norm_weight: ``[D]``.
        eps: added to the mean square.
        mailbox: of this rank.

    Returns:
        As `reduce_add_norm`; each rank's part is rounded once before it is sent.
    """
    return _reduce(pairs, routes, shared, residual, norm_weight, eps, mailbox)


def _reduce(
    part: torch.Tensor,
    routes: Routes | None,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    mailbox: Mailbox,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels.exchange.kernel import reduce_kernel

    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    if len(residual):
        two_way = mailbox.num_gpus > 2 and residual.nbytes >= TWO_WAY_BYTES
        reduce_kernel[_programs(residual)](
            _words(part),
            None if routes is None else routes.slots,
            None if routes is None else routes.weights,
            None if shared is None else _words(shared),
            _words(residual),
            norm_weight,
            _words(total),
            _words(normed),
            mailbox.boxes,
            mailbox.peers,
            mailbox.counters,
            mailbox.sums if two_way else None,
            mailbox.sum_peers if two_way else None,
            **_sizes(residual, mailbox),
            eps=eps,
            TOP_K=0 if routes is None else routes.slots.shape[1],
            KIND=KINDS[residual.dtype],
        )
    return total, normed


def gather(rows: torch.Tensor, mailbox: Mailbox) -> torch.Tensor:
    """Every rank's rows on every rank.

    Args:
        rows: of any dtype whose rows are whole 32-bit words ``[T, N]``; T is the same on every rank.
        mailbox: of this rank.

    Returns:
        ``[G, T, N]``.
    """
    from kernels.exchange.kernel import gather_kernel

    out = rows.new_empty((mailbox.num_gpus, *rows.shape))
    if len(rows):
        gather_kernel[_programs(rows)](
            _words(rows), _words(out), mailbox.boxes, mailbox.peers, mailbox.counters, **_sizes(rows, mailbox)
        )
    return out


def gather_routes(
    ids: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor,
    mailbox: Mailbox,
    slot_of_expert: torch.Tensor | None = None,
    gpu_of_expert: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Every rank's routes on every rank, and where its experts have one copy each, who serves them.

    Args:
        ids: logical experts of this rank's rows, int32 ``[T, K]``; T is the same on every rank.
        weights: float32 ``[T, K]``.
        places: integer ``[T]``, negative for padding.
        mailbox: of this rank.
        slot_of_expert: of this rank, int32 ``[E]``, -1 where it has none.
        gpu_of_expert: the rank that has it, integer ``[E]``; None looks nothing up.

    Returns:
        Experts and weights of all rows, slots on this rank and the ranks that serve the pairs (both None where nothing
        was looked up), ``[G, T, K]``; all but the weights are int32, and -1 in padding.
    """
    from kernels.exchange.alltoall import gather_routes_kernel

    size = (mailbox.num_gpus, *ids.shape)
    all_ids, all_weights = ids.new_empty(size), weights.new_empty(size)
    slots, gpus = (None, None) if gpu_of_expert is None else (ids.new_empty(size), ids.new_empty(size))
    if len(ids):
        gather_routes_kernel[_programs(ids)](
            ids,
            _words(weights),
            places,
            all_ids,
            _words(all_weights),
            slots,
            gpus,
            slot_of_expert,
            gpu_of_expert,
            mailbox.boxes,
            mailbox.peers,
            mailbox.counters,
            **_sizes(ids, mailbox, 8 * ids.shape[1]),
            TOP_K=ids.shape[1],
        )
    return all_ids, all_weights, slots, gpus


def dispatch(rows: torch.Tensor, gpus: torch.Tensor, mailbox: Mailbox) -> torch.Tensor:
    """Send each row once to every rank that serves one of its pairs.

    Between two calls with one mailbox every rank must hear from every other, as `gather` of the routes does.

    Args:
        rows: this rank's ``[T, D]``; T is the same on every rank.
        gpus: the rank that serves each pair of all ranks' rows, the same on every rank, int32 ``[G, T, K]``.
        mailbox: of this rank.

    Returns:
        All ranks' rows ``[G, T, D]``; undefined where this rank serves none of their pairs.
    """
    from kernels.exchange.alltoall import dispatch_kernel

    out = rows.new_empty((mailbox.num_gpus, *rows.shape))
    if len(rows):
        dispatch_kernel[_programs(rows)](
            _words(rows),
            gpus,
            _words(out),
            mailbox.boxes,
            mailbox.peers,
            mailbox.counters,
            mailbox.received,
            **_sizes(rows, mailbox),
            TOP_K=gpus.shape[2],
        )
    return out


def collect(
    pairs: torch.Tensor,
    routes: Routes,
    gpus: torch.Tensor,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    mailbox: Mailbox,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send what this rank computed of other ranks' rows home, and finish its own rows as `reduce_combine` does.

    Between two calls with one mailbox every rank must hear from every other, as for `dispatch`.

    Args:
        pairs: outputs of the pairs of all ranks' rows that this rank served ``[G·T·K, D]``.
        routes: slots on this rank and weights of all ranks' rows ``[G·T, K]``.
        gpus: as for `dispatch`.
        shared: output of the shared experts for this rank's rows ``[T, D]``, or None.
        residual: of this rank's rows ``[T, D]``.
        norm_weight: ``[D]``.
        eps: added to the mean square.
        mailbox: of this rank, another one than that of `dispatch`.

    Returns:
        The new residual and its norm, of this rank's rows ``[T, D]``.
    """
    from kernels.exchange.alltoall import collect_kernel

    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    if len(residual):
        collect_kernel[_programs(residual)](
            _words(pairs),
            routes.slots,
            routes.weights,
            gpus,
            None if shared is None else _words(shared),
            _words(residual),
            norm_weight,
            _words(total),
            _words(normed),
            mailbox.boxes,
            mailbox.peers,
            mailbox.counters,
            **_sizes(residual, mailbox),
            eps=eps,
            TOP_K=gpus.shape[2],
            KIND=KINDS[residual.dtype],
        )
    return total, normed


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def _programs(rows: torch.Tensor) -> tuple[int]:
    return (min(len(rows), PROGRAMS),)


def _sizes(rows: torch.Tensor, mailbox: Mailbox, row_bytes: int | None = None) -> dict[str, Any]:
    """What all kernels take alike, for messages of so many bytes (None: of the rows themselves).

    Raises:
        OperatorError: the rows do not fit into the mailbox.
    """
    row_bytes = rows.shape[1] * rows.itemsize if row_bytes is None else row_bytes
    if len(rows) > mailbox.most_rows or row_bytes > mailbox.row_bytes:
        raise OperatorError(
            f"{len(rows)} rows of {row_bytes} bytes: expected at most {mailbox.most_rows} of {mailbox.row_bytes}; make "
            "a larger mailbox"
        )
    words = row_bytes // 4
    return {
        "num_rows": len(rows),
        "most_rows": mailbox.most_rows,
        "stride": mailbox.boxes.shape[3],
        "width": words,
        "rank": mailbox.rank,
        "GPUS": mailbox.num_gpus,
        "BLOCK": power_of_two(words),
        "num_warps": max(1, min(8, power_of_two(words) // 128)),
        **overlap(rows),
    }

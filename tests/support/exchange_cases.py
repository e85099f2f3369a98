"""The exchange between ranks against its reference: several processes, on GPUs or in Triton's interpreter.

    torchrun --nproc-per-node 2 -m tests.support.exchange_cases

runs on that many GPUs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch

from kernels.exchange import Mailbox, collect, dispatch, gather, gather_routes, reduce_add_norm, reduce_combine
from kernels.exchange.mailbox import messages
from kernels.exchange.reference import finish, rows_served, sum_parts, weighted_part
from kernels.route import Routes
from tests.support.moe_cases import assert_close, poisoned

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5
GPU_CASES = [(8, 2048, torch.bfloat16), (4, 2880, torch.bfloat16), (1, 64, torch.float32), (2, 2048, torch.float16)]
PADDING = 0.2  # share of rows
Delay = Callable[[], None]


class Inputs:
    """What all ranks have in one exchange, the same in every process; on the CPU.

    Attributes:
        gpus: of every pair, int32 ``[G, T, K]``, -1 in padding.
        weights: float32 ``[G, T, K]``.
        rows: ``[G, T, D]``.
        shared: ``[G, T, D]``.
        residual: ``[G, T, D]``.
        pairs: ``[rank that computed, G·T·K, D]``.
        norm: ``[D]``.
    """

    def __init__(self, seed: int, world: int, tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.gpus = torch.randint(world, (world, tokens, top_k), generator=generator, dtype=torch.int32)
        self.gpus[torch.rand(world, tokens, generator=generator) < PADDING] = -1
        self.weights = torch.rand(world, tokens, top_k, generator=generator)
        self.rows, self.shared, self.residual = torch.randn(3, world, tokens, width, generator=generator).to(dtype)
        self.pairs = torch.randn(world, world * tokens * top_k, width, generator=generator).to(dtype)
        self.norm = torch.randn(width, generator=generator).to(dtype)

    def routes(self, rank: int, home: int | None = None) -> Routes:
        """Routes of one rank's rows, or all, as a rank sees them: slot 0 where it serves the pair."""
        gpus, weights = (self.gpus, self.weights) if home is None else (self.gpus[home], self.weights[home])
        slots = torch.where(gpus == rank, 0, -1).int().flatten(0, -2)
        return Routes(slots, slots, weights.flatten(0, -2))


def check_rank(
    mailboxes: list[Mailbox], world: int, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int, delay: Delay
) -> None:
    """Every operation once; all ranks call this with the same arguments.

    Args:
        mailboxes: of this rank, one for the sums, one for routes, one for rows and one for results.
        world: number of ranks.
        sizes: rows of each rank, choices per row, width.
        dtype: of rows.
        seed: of the inputs.
        delay: called before every operation.
    """
    rank, device = mailboxes[0].rank, mailboxes[0].boxes.device
    tokens, top_k, width = sizes
    inputs = Inputs(seed, world, *sizes, dtype)
    norm, residual, shared = (tensor.to(device) for tensor in (inputs.norm, inputs.residual, inputs.shared))

    def on_device(routes: Routes) -> Routes:
        return Routes(*(tensor.to(device) for tensor in routes))

    def agree(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, TOLERANCE[dtype])

    with poisoned():
        delay()
        found = reduce_add_norm(inputs.rows[rank].to(device), residual[0], norm, EPS, mailboxes[0])
        agree(found, finish(sum_parts(inputs.rows), None, inputs.residual[0], inputs.norm, EPS))

        held = inputs.pairs[:, : tokens * top_k]  # every rank has rank 0's rows
        parts = [weighted_part(held[gpu], inputs.routes(gpu, 0)) for gpu in range(world)]
        pairs, routes = held[rank].to(device), on_device(inputs.routes(rank, 0))
        delay()
        found = reduce_combine(pairs, routes, shared[0], residual[0], norm, EPS, mailboxes[0])
        agree(found, finish(sum_parts(torch.stack(parts)), inputs.shared[0], inputs.residual[0], inputs.norm, EPS))
        delay()
        everyones = gather(found[1], mailboxes[2])
        assert (everyones == everyones[0]).all(), "the same bits on all ranks"

        delay()
        gpus = gather_everyones_routes(inputs, mailboxes[1])
        delay()
        came = mailboxes[2].received.sum().item()
        received = dispatch(inputs.rows[rank].to(device), gpus, mailboxes[2]).cpu()
        needed = rows_served(inputs.gpus, rank)
        assert torch.equal(received[needed], inputs.rows[needed])
        assert mailboxes[2].received.sum().item() - came == needed.sum() - needed[rank].sum()

        delay()
        routes = on_device(inputs.routes(rank))
        pairs = inputs.pairs[rank].to(device)
        own = residual[rank]
        found = collect(pairs, routes, gpus, shared[rank], own, norm, EPS, mailboxes[3])
        mine = slice(rank * tokens, (rank + 1) * tokens)
        parts = [
            weighted_part(inputs.pairs[gpu], inputs.routes(gpu))
            .view(-1, width)[mine]
            .where(rows_served(inputs.gpus[rank], gpu)[:, None], torch.zeros(width, dtype=dtype))
            for gpu in range(world)
        ]
        agree(
            found, finish(sum_parts(torch.stack(parts)), inputs.shared[rank], inputs.residual[rank], inputs.norm, EPS)
        )


def gather_everyones_routes(inputs: Inputs, mailbox: Mailbox) -> torch.Tensor:
    """The GPU of every pair, where GPU g alone has the experts g and g + G; as this rank finds it."""
    rank, world, device = mailbox.rank, mailbox.num_gpus, mailbox.boxes.device
    places = (inputs.gpus[rank, :, 0]).long()
    odd = torch.arange(inputs.gpus.numel()).view_as(inputs.gpus) % 2
    experts = torch.where(inputs.gpus < 0, 0, inputs.gpus + odd * world).int()
    own = experts[rank].to(device), inputs.weights[rank].to(device), places.to(device)
    slot_of_expert = torch.tensor([0 if e % world == rank else -1 for e in range(2 * world)], dtype=torch.int32)
    ids, weights, slots, gpus = gather_routes(
        *own, mailbox, slot_of_expert.to(device), (torch.arange(2 * world) % world).to(device)
    )
    assert slots is not None
    assert gpus is not None
    assert torch.equal(ids.cpu(), torch.where(inputs.gpus < 0, -1, experts))
    assert torch.equal(weights.cpu(), inputs.weights)
    assert torch.equal(gpus.cpu(), inputs.gpus)
    assert torch.equal(slots.cpu(), torch.where(inputs.gpus == rank, 0, -1).int())
    plain = gather_routes(*own, mailbox)
    assert torch.equal(plain[0], ids)
    assert plain[2:] == (None, None)
    return gpus


def _interpreted_rank(rank: int, memories: list[torch.Tensor], most_rows: int, words: int, cases: Any) -> None:
    import traceback

    torch.set_num_threads(1)
    chooser = random.Random(rank)
    parts = [memory.chunk(4) for memory in memories]
    boxes = [
        Mailbox.in_memory(parts[rank][kind], [part[kind].data_ptr() for part in parts], rank, most_rows, words)
        for kind in range(4)
    ]

    def delay() -> None:
        import time

        time.sleep(chooser.choice((0.0, 0.0, 0.02)))

    try:
        for seed, (sizes, dtype) in enumerate(cases):
            check_rank(boxes, len(memories), sizes, dtype, seed, delay)
    except BaseException:  # noqa: BLE001 - a forked process must not go on into its parent's tests
        traceback.print_exc()
        os._exit(1)


def check_in_interpreter(world: int, cases: list[tuple[tuple[int, int, int], torch.dtype]]) -> None:
    """Run the cases one after the other with the same mailboxes, in processes that share memory."""
    import torch.multiprocessing as multiprocessing

    most_rows, words = max(sizes[0] for sizes, _ in cases), max(sizes[2] for sizes, _ in cases)
    memories = [
        torch.zeros(4 * messages(world, most_rows, words), dtype=torch.int64).share_memory_() for _ in range(world)
    ]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_interpreted_rank, args=(rank, memories, most_rows, words, cases))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    """Many sizes in a changing order on GPUs, one process each, with delays, eagerly and as a graph."""
    import torch.distributed as dist

    from kernels.exchange import open_mailbox

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mailboxes = [open_mailbox(dist.group.WORLD, 300, 2880 * 4, device) for _ in range(4)]
    order, chooser = random.Random(0), random.Random(rank)

    def delay() -> None:
        torch.cuda._sleep(chooser.choice((0, 0, 2000, 200_000)))

    for seed in range(40):
        top_k, width, dtype = order.choice(GPU_CASES)
        check_rank(mailboxes, world, (order.choice((1, 2, 8, 129, 300)), top_k, width), dtype, seed, delay)
    replay_together(mailboxes[0], delay)
    torch.cuda.synchronize()
    dist.barrier()
    print(f"rank {rank} of {world}: all exchanges agree with the reference")
    dist.destroy_process_group()


def replay_together(mailbox: Mailbox, delay: Delay) -> None:
    """Two graphs with odd numbers of exchanges, replayed in a changing order; the sums must stay those of one rank."""
    device, generator = mailbox.boxes.device, torch.Generator().manual_seed(0)
    part, residual = torch.randn(2, 256, 2048, generator=generator).to(device, torch.bfloat16)
    norm = torch.ones(2048, dtype=torch.bfloat16, device=device)
    graphs, results = [], []
    for rows, exchanges in ((3, 5), (256, 3)):
        outputs = []
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            normed = part[:rows] + 0
            for _ in range(exchanges):
                _, normed = reduce_add_norm(normed, residual[:rows], norm, EPS, mailbox)
                outputs.append(normed)
        graphs.append(graph)
        results.append(outputs)
    order, expected = random.Random(1), {}
    for _ in range(2000):
        number = order.randrange(2)
        delay()
        graphs[number].replay()
        found = results[number][-1].float().sum()  # of the same bits every time
        assert torch.equal(expected.setdefault(number, found), found)


if __name__ == "__main__":
    main()

"""Ranks that decode natively together for many steps, each held up at random: they must find the same tokens.

torchrun --nproc-per-node 2 -m tests.support.native_soak MODEL STEPS EXCHANGE

Memory that is handed out unwritten is full of NaN.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

import torch

from runtime.distributed import RankAddress, RankGroup, choose_backend, choose_device
from runtime.native.model import NativeModel
from tests.support.moe_cases import poisoned
from tests.support.native import admission, decode, prefill, retire
from tests.support.native_ranks import NativeJob
from tests.support.plans import make_plan

MOST_TOKENS, COMPARED = 40, 100  # of a sequence; steps between two comparisons


class Choices:
    """Takes the place of a recording: the sum over all routes that this rank knows of."""

    def __init__(self, device: torch.device) -> None:
        self.checksum = torch.zeros((), dtype=torch.int64, device=device)

    def keep(self, fed: Sequence[object], experts: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
        """Add a pass."""
        rows = sum(tokens.count for tokens in fed)  # type: ignore[attr-defined]
        for layer, (ids, shares) in enumerate(zip(experts, weights, strict=True)):
            numbers = ids[:rows].long() * 1009 + shares[:rows].contiguous().view(torch.int32)
            self.checksum += (layer + 1) * (numbers * torch.arange(1, rows + 1, device=ids.device)[:, None]).sum()


class Soak:
    """Sequences that come and go by one seed on all ranks, and the sum over everything that they found.

    Args:
        model: this rank's part.
        rank: of this process; seeds its delays.
    """

    def __init__(self, model: NativeModel, rank: int) -> None:
        self.model = model
        self.shared, self.own = random.Random(0), random.Random(rank + 1)
        self.ages: dict[int, int] = {}
        ranks = model.decoder.ranks
        assert ranks is not None
        self.homes = ranks.group.world_size if ranks.splits_rows else 1
        self.choices = Choices(ranks.group.device)
        model.recording = self.choices  # type: ignore[assignment]
        self.checksum = 0

    def step(self) -> None:
        """Retire, admit, decode."""
        old = [
            number for number, age in self.ages.items() if age >= self.shared.randrange(MOST_TOKENS // 2, MOST_TOKENS)
        ]
        retire(self.model, old)
        for number in old:
            del self.ages[number]
        free = [number for number in range(8) if number not in self.ages]
        if free and (not self.ages or self.shared.random() < 0.2):
            coming = free[: self.shared.randrange(1, 4)]
            prompts = [[self.shared.randrange(4, 120) for _ in range(self.shared.randrange(1, 30))] for _ in coming]
            self._delay()
            admissions = [admission(n, p, MOST_TOKENS, self.homes) for n, p in zip(coming, prompts, strict=True)]
            self._note(prefill(self.model, admissions))
            self.ages |= dict.fromkeys(coming, 0)
        self._delay()
        self._note(decode(self.model))
        for number in self.ages:
            self.ages[number] += 1

    def _delay(self) -> None:
        """Hold up the host or the device, seldom for long."""
        chance = self.own.random()
        if chance < 0.02:
            time.sleep(0.003)
        elif chance < 0.1 and torch.cuda.is_available():
            torch.cuda._sleep(self.own.randrange(1_000_000))

    def _note(self, tokens: dict[int, int]) -> None:
        for number, token in tokens.items():
            assert token >= 0, "logits are not finite"
            self.checksum = (self.checksum * 31 + number * 1009 + token) % (1 << 61)
        if self.homes > 1:
            return  # no other rank has these logits
        bits = [logits.float().contiguous().view(torch.int32).sum(dtype=torch.int64) for logits in self.model.logits]
        self.checksum = (self.checksum + int(torch.stack(bits).sum())) % (1 << 61)


def main() -> None:
    """Decode and compare all ranks' checksums now and then."""
    model, steps, exchange = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    address = RankAddress.from_environment()
    assert address is not None
    device = choose_device("auto", address)
    group = RankGroup(address, device, choose_backend(device, address), 60)
    plan = make_plan(model, "replicated", group.world_size).to_dict()
    on_gpu = device.type == "cuda"
    dtype, settings = "bfloat16" if on_gpu else "float32", {"exchange": exchange}
    job = NativeJob(model, plan, [], [], 0, dtype, graphs=on_gpu, settings=settings)
    start_s = time.perf_counter()
    with poisoned():
        soak = Soak(job.load(group), group.rank)
        decode_together(soak, group, steps)
    print(f"rank {group.rank}: {steps} steps in {time.perf_counter() - start_s:.1f} s, checksum {soak.checksum}")
    group.close()


def decode_together(soak: Soak, group: RankGroup, steps: int) -> None:
    """Take steps; every now and then all ranks must have found the same."""
    for step in range(1, steps + 1):
        soak.step()
        if step % COMPARED == 0 or step == steps:
            found = group.gather_tokens(torch.tensor([soak.checksum, int(soak.choices.checksum)]))
            assert (found == found[0]).all(), f"step {step}: ranks found {found.tolist()}"


if __name__ == "__main__":
    main()

"""Ranks that decode natively together for many steps, each held up at random: they must find the same tokens.

torchrun --nproc-per-node 2 -m tests.support.native_soak MODEL STEPS
"""

from __future__ import annotations

import random
import sys
import time

import torch

from runtime.distributed import RankAddress, RankGroup, choose_backend, choose_device
from runtime.native.model import NativeModel
from tests.support.native import admission, decode, prefill, retire
from tests.support.native_ranks import NativeJob
from tests.support.plans import make_plan

MOST_TOKENS, COMPARED = 40, 100  # of a sequence; steps between two comparisons


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
            self._note(
                prefill(self.model, [admission(n, p, MOST_TOKENS) for n, p in zip(coming, prompts, strict=True)])
            )
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
        bits = [logits.float().contiguous().view(torch.int32).sum(dtype=torch.int64) for logits in self.model.logits]
        self.checksum = (self.checksum + int(torch.stack(bits).sum())) % (1 << 61)


def main() -> None:
    """Decode and compare all ranks' checksums now and then."""
    model, steps = sys.argv[1], int(sys.argv[2])
    address = RankAddress.from_environment()
    assert address is not None
    device = choose_device("auto", address)
    group = RankGroup(address, device, choose_backend(device, address), 60)
    plan = make_plan(model, "replicated", group.world_size).to_dict()
    on_gpu = device.type == "cuda"
    job = NativeJob(model, plan, [], [], 0, "bfloat16" if on_gpu else "float32", graphs=on_gpu)
    soak = Soak(job.load(group), group.rank)
    start_s = time.perf_counter()
    for step in range(1, steps + 1):
        soak.step()
        if step % COMPARED == 0 or step == steps:
            found = group.gather_tokens(torch.tensor([soak.checksum]))
            assert (found == found[0]).all(), f"step {step}: ranks found {found.flatten().tolist()}"
    print(f"rank {group.rank}: {steps} steps in {time.perf_counter() - start_s:.1f} s, checksum {soak.checksum}")
    group.close()


if __name__ == "__main__":
    main()

"""Decode a large random-weight model by several plans: does it agree with one rank, and how long does a step take?

Run once with one rank to record the reference, then with more (torchrun starts the ranks):

    torchrun --nproc-per-node 1 -m benchmarks.expert_parallel_decode --reference /tmp/reference -o one.json
    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel_decode --reference /tmp/reference -o two.json

Agreement is measured twice: with the reference's routes forced (the logits must then agree within bf16's tolerance),
and with free routing (near-ties may flip a few routes).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from placement.plan import Dispatch, PlacementPlan, Workload
from runtime.bench import DecodeBenchmark, describe_machine, describe_run, time_batch
from runtime.context import Routes
from runtime.distributed import RankAddress
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.start import Run, join_group, load_worker
from runtime.step_plan import Admission, StepPlan
from runtime.worker import RankWorker

SHAPE = Path(__file__).parent / "shapes" / "qwen3-30b-a3b"
PROMPTS, PROMPT_TOKENS, DECODE_STEPS = 8, 32, 16
SHARES = (1, 2, 4)  # ranks that the prompts are dealt to
Sample = Callable[[list[int], torch.Tensor], dict[int, int]]


def make_plan(kind: str, num_experts: int, top_k: int, layers: list[int], num_gpus: int) -> PlacementPlan:
    """Contiguous or shuffled, or shuffled with a quarter more slots per GPU for copies (``copies``)."""
    generator = random.Random(0)
    slots = []
    for _ in layers:
        order = list(range(num_experts))
        if kind != "contiguous":
            generator.shuffle(order)
        gpus = [order[gpu * num_experts // num_gpus : (gpu + 1) * num_experts // num_gpus] for gpu in range(num_gpus)]
        if kind == "copies":
            extra = num_experts // num_gpus // 4
            gpus = [own + generator.sample([e for e in order if e not in own], extra) for own in gpus]
        slots.append(tuple(tuple(gpu) for gpu in gpus))
    return PlacementPlan(
        model=str(SHAPE),
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=tuple(layers),
        slots=tuple(slots),
        workload=Workload(),
        dispatch=Dispatch(split_above_tokens=64),
        strategy=kind,
    )


class Recorder:
    """Runs the prompts on one rank, as one batch and as the smaller batches that 2 and 4 ranks have in ``alltoall``.

    bf16 matrix products depend on the number of rows in the last bits, so that a batch is compared with one of its
    own size.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.tensors: dict[str, torch.Tensor] = {}
        self.prefix, self.step = "", 0

    def record(self) -> dict[str, torch.Tensor]:
        """Logits, tokens and routes by step, for every way to share the prompts."""
        worker = universal_worker(self.run)
        worker.context.on_routes = self._routes
        with mock.patch.object(worker, "_sample", functools.partial(self._logits, worker._sample)):
            for shares in SHARES:
                for share in range(shares):
                    self.prefix = f"{shares}.{share}"
                    numbers = range(share, PROMPTS, shares)
                    first = StepPlan.prefill(admissions(self.run, numbers, 1))
                    for self.step in range(DECODE_STEPS):
                        worker.execute(first if self.step == 0 else StepPlan())
                    worker.execute(StepPlan(retire=list(numbers)))
        worker.context.on_routes = None
        return self.tensors

    def _routes(self, layer: int, routes: Routes) -> None:
        key = f"{self.prefix}.{self.step}.{layer}"
        self.tensors[f"ids.{key}"], self.tensors[f"weights.{key}"] = routes[0].cpu(), routes[1].cpu()

    def _logits(self, sample: Sample, sequences: list[int], logits: torch.Tensor) -> dict[int, int]:
        tokens = sample(sequences, logits)
        key = f"{self.prefix}.{self.step}"
        self.tensors[f"logits.{key}"] = logits.cpu()
        self.tensors[f"tokens.{key}"] = torch.tensor([tokens[sequence] for sequence in sequences])
        return tokens


class Agreement:
    """Runs the prompts on all ranks, always feeding the reference's tokens, and compares logits and routes.

    Args:
        run: the rank.
        reference: what `Recorder.record` made on one rank.
        force: take the reference's routes.
    """

    def __init__(self, run: Run, reference: dict[str, torch.Tensor], force: bool) -> None:
        self.run, self.reference, self.force = run, reference, force
        shares = 1 if run.worker.everyone_holds_all else run.group.world_size
        self.shares = shares
        self.prefix = f"{shares}.{run.group.rank if shares > 1 else 0}"
        self.largest_error, self.pairs, self.differing = 0.0, 0, 0
        self.step = 0

    def compare(self) -> torch.Tensor:
        """Largest relative error of the logits, differing pairs and all pairs, over all ranks."""
        worker = universal_worker(self.run)
        worker.context.forced_routes = self._routes
        first = StepPlan.prefill(admissions(self.run, range(PROMPTS), self.shares))
        with mock.patch.object(worker, "_sample", functools.partial(self._logits, worker._sample)):
            for self.step in range(DECODE_STEPS):
                worker.execute(first if self.step == 0 else StepPlan())
                for share in range(self.shares):
                    tokens = self.reference[f"tokens.{self.shares}.{share}.{self.step}"].tolist()
                    worker.last_token.update(zip(range(share, PROMPTS, self.shares), tokens, strict=True))
            worker.execute(StepPlan(retire=list(range(PROMPTS))))
        worker.context.forced_routes = None
        mine = torch.tensor([self.largest_error, self.differing, self.pairs], device=self.run.group.device)
        everyone = self.run.group.all_gather(mine).cpu()
        return torch.stack([everyone[:, 0].max(), everyone[:, 1].sum(), everyone[:, 2].sum()])

    def _routes(self, layer: int, routes: Routes) -> Routes:
        ids, weights = routes
        key = f"{self.prefix}.{self.step}.{layer}"
        expected = self.reference[f"ids.{key}"].to(ids.device)
        if self.force:
            return expected, self.reference[f"weights.{key}"].to(weights.device)
        missing = (ids[:, :, None] == expected[:, None, :]).any(dim=2).logical_not()
        self.pairs += missing.numel()
        self.differing += int(missing.sum())
        return routes

    def _logits(self, sample: Sample, sequences: list[int], logits: torch.Tensor) -> dict[int, int]:
        expected = self.reference[f"logits.{self.prefix}.{self.step}"].to(logits.device)
        error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
        self.largest_error = max(self.largest_error, float(error.max()))
        return sample(sequences, logits)


def universal_worker(run: Run) -> RankWorker:
    """The run's worker, whose routes and logits can be read and replaced."""
    assert isinstance(run.worker, RankWorker)
    return run.worker


def admissions(run: Run, numbers: Iterable[int], homes: int) -> list[Admission]:
    """The fixed prompts with these numbers, greedy, dealt to so many ranks."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(run.worker.facts.vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    greedy = SamplingParameters(temperature=0, seed=0)
    return [Admission(number, prompts[number], number % homes, greedy) for number in numbers]


def measure(run: Run, reference: dict[str, torch.Tensor], benchmark: DecodeBenchmark) -> list[dict[str, Any]]:
    """Agreement and step times of one plan; rows are meaningful on rank 0."""
    rows: list[dict[str, Any]] = []
    for force in (True, False) if reference else ():
        error, differing, pairs = Agreement(run, reference, force).compare().tolist()
        row = describe_run(run, PROMPTS, f"{PROMPT_TOKENS}-{PROMPT_TOKENS + DECODE_STEPS}")
        row |= {"kind": "agreement", "routes": "forced" if force else "model", "repeats": DECODE_STEPS}
        row["largest_relative_logit_error"] = error
        if not force:
            row["differing_routes_fraction"] = differing / pairs
        rows.append(row)
    for batch in benchmark.batch_sizes:
        rows.append({"kind": "decode"} | time_batch(run, benchmark, batch))
    for row in rows:
        if run.group.rank == 0:
            figures = {k: v for k, v in row.items() if isinstance(v, float)}
            print(row["placement"], row["exchange"], row["kind"], row["routes"], row["batch"], figures, flush=True)
    return rows


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of the one-rank record")
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shape", default=str(SHAPE), help="folder with a config.json")
    parser.add_argument("--plans", default="contiguous,shuffled,copies")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=16)
    return parser.parse_args()


def main() -> None:
    """Measure every plan with this many ranks."""
    flags = parse_flags()
    address = RankAddress.from_environment()
    if address is None:
        sys.exit("error: no RANK is set; start me with torchrun, see --help")
    config = json.loads((Path(flags.shape) / "config.json").read_text())
    batches = tuple(int(size) for size in flags.batches.split(",") if size)
    benchmark = DecodeBenchmark(batches, context=128, steps=flags.steps, warmup_steps=4, seed=0)
    group = join_group(address, EngineSettings(device=flags.device))
    record = Path(flags.reference) / "reference.safetensors"
    recording = group.world_size == 1
    reference = {} if recording else load_file(record)
    rows: list[dict[str, Any]] = []
    layers = list(range(config["num_hidden_layers"]))
    for kind in ["contiguous"] if recording else flags.plans.split(","):
        plan = make_plan(kind, config["num_experts"], config["num_experts_per_tok"], layers, group.world_size)
        for exchange in ("allreduce",) if recording else ("allreduce", "alltoall"):
            settings = EngineSettings(
                weights="random", dtype="bfloat16", device=flags.device, exchange=exchange, path="universal"
            )
            run = Run(plan, flags.shape, group, load_worker(plan, flags.shape, settings, group), None)
            if recording:
                Path(flags.reference).mkdir(parents=True, exist_ok=True)
                save_file(Recorder(run).record(), record)
            rows += measure(run, reference, benchmark)
            del run
            gc.collect()  # a shard and its experts module refer to each other
            if group.device.type == "cuda":
                torch.cuda.empty_cache()
    if group.rank == 0:
        Path(flags.output).write_text(json.dumps(describe_machine(group) | {"rows": rows}, indent=1) + "\n")
    group.close()


if __name__ == "__main__":
    main()

"""Decode a large random-weight model by several plans: does it agree with one rank, and how long does a step take?

Run once with one rank to record the reference, then with more (torchrun starts the ranks):

    torchrun --nproc-per-node 1 -m benchmarks.expert_parallel_decode --reference /tmp/reference -o one.json
    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel_decode --reference /tmp/reference -o two.json

Agreement is measured twice: with the reference's routes forced (the logits must then agree within bf16's tolerance),
and with free routing (near-ties may flip a few routes).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from placement.plan import Dispatch, PlacementPlan, Workload
from runtime.bench import DecodeBenchmark, describe_run, time_batch
from runtime.distributed import RankAddress
from runtime.settings import EngineSettings
from runtime.start import Run, join_group, load_worker
from runtime.step_plan import Admission, StepPlan

SHAPE = Path(__file__).parent / "shapes" / "qwen3-30b-a3b"
PROMPTS, PROMPT_TOKENS, DECODE_STEPS = 8, 32, 16


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


class Agreement:
    """Runs fixed prompts, and either records or compares logits and routes.

    Args:
        run: the rank.
        reference: tensors of the one-rank run, empty to record them.
        force: take the reference's routes.
    """

    def __init__(self, run: Run, reference: dict[str, torch.Tensor], force: bool) -> None:
        self.run, self.reference, self.force = run, reference, force
        self.recorded: dict[str, torch.Tensor] = {}
        self.largest_error, self.routes_seen, self.routes_differing = 0.0, 0, 0
        self.step = 0
        context = run.worker.context
        context.forced_routes = self._routes
        self._sample, run.worker._sample = run.worker._sample, self._logits  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave the worker as it was."""
        self.run.worker.context.forced_routes = None
        self.run.worker._sample = self._sample  # type: ignore[method-assign]

    def run_prompts(self) -> None:
        """Prefill all prompts, then decode, always feeding the reference's tokens."""
        worker, group = self.run.worker, self.run.group
        vocabulary = worker.model.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
        homes = 1 if worker.everyone_holds_all else group.world_size
        admit = [Admission(number, prompt, number % homes, 0.0, 1.0, 0) for number, prompt in enumerate(prompts)]
        for self.step in range(DECODE_STEPS):
            tokens = worker.execute(StepPlan(admit=admit if self.step == 0 else []))
            row = torch.tensor([tokens[number] for number in range(PROMPTS)])
            self.recorded[f"tokens.{self.step}"] = row
            if self.reference:
                row = self.reference[f"tokens.{self.step}"]
            worker.last_token.update(enumerate(row.tolist()))
        worker.execute(StepPlan(retire=list(range(PROMPTS))))

    def _mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Of a reference tensor over all prompts' tokens, the rows of this rank's sequences."""
        if self.run.worker.everyone_holds_all:
            return rows
        per_prompt = rows.view(PROMPTS, -1, rows.shape[-1])
        return per_prompt[self.run.group.rank :: self.run.group.world_size].reshape(-1, rows.shape[-1])

    def _routes(self, layer: int, routes: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = routes
        key = f"{self.step}.{layer}"
        if not self.reference:
            self.recorded[f"ids.{key}"], self.recorded[f"weights.{key}"] = ids.cpu(), weights.cpu()
            return routes
        expected = self._mine(self.reference[f"ids.{key}"]).to(ids.device)
        if self.force:
            return expected, self._mine(self.reference[f"weights.{key}"]).to(weights.device)
        missing = (ids[:, :, None] == expected[:, None, :]).any(dim=2).logical_not()
        self.routes_seen += missing.numel()
        self.routes_differing += int(missing.sum())
        return routes

    def _logits(self, sequences: list[int], logits: torch.Tensor) -> dict[int, int]:
        key = f"logits.{self.step}"
        if not self.reference:
            self.recorded[key] = logits.cpu()
        else:
            expected = self.reference[key][sequences].to(logits.device)
            error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
            self.largest_error = max(self.largest_error, float(error.max()))
        return self._sample(sequences, logits)


def measure(run: Run, reference: dict[str, torch.Tensor], benchmark: DecodeBenchmark) -> list[dict[str, Any]]:
    """Agreement and step times of one plan; rows are meaningful on rank 0."""
    rows: list[dict[str, Any]] = []
    for force in (True, False) if reference else ():
        agreement = Agreement(run, reference, force)
        agreement.run_prompts()
        agreement.close()
        errors = run.group.all_gather(
            torch.tensor(
                [agreement.largest_error, agreement.routes_differing, max(1, agreement.routes_seen)],
                device=run.group.device,
            )
        ).cpu()
        row = describe_run(run, PROMPTS, f"{PROMPT_TOKENS}-{PROMPT_TOKENS + DECODE_STEPS}")
        row |= {"kind": "agreement", "routes": "forced" if force else "model", "repeats": DECODE_STEPS}
        row["largest_relative_logit_error"] = float(errors[:, 0].max())
        row["routes_differing_fraction"] = float(errors[:, 1].sum() / errors[:, 2].sum())
        rows.append(row)
    for batch in benchmark.batch_sizes:
        rows.append({"kind": "decode"} | time_batch(run, benchmark, batch))
    for row in rows:
        if run.group.rank == 0:
            figures = {k: v for k, v in row.items() if isinstance(v, float)}
            print(row["placement"], row["exchange"], row["kind"], row["routes"], row["batch"], figures, flush=True)
    return rows


def main() -> None:
    """Measure every plan with this many ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of the one-rank record")
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shape", default=str(SHAPE), help="folder with a config.json")
    parser.add_argument("--plans", default="contiguous,shuffled,copies")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=16)
    flags = parser.parse_args()
    address = RankAddress.from_environment()
    if address is None:
        sys.exit("start me with torchrun, see --help")
    config = json.loads((Path(flags.shape) / "config.json").read_text())
    batches = tuple(int(size) for size in flags.batches.split(",") if size)
    benchmark = DecodeBenchmark(batches, context=128, steps=flags.steps, warmup_steps=4, seed=0)
    settings = EngineSettings(weights="random", dtype="bfloat16", device=flags.device)
    group = join_group(address, settings)
    record = Path(flags.reference) / "reference.safetensors"
    reference = load_file(record) if group.world_size > 1 else {}
    rows: list[dict[str, Any]] = []
    layers = list(range(config["num_hidden_layers"]))
    for kind in flags.plans.split(",") if reference else ["contiguous"]:
        plan = make_plan(kind, config["num_experts"], config["num_experts_per_tok"], layers, group.world_size)
        for exchange in ("allreduce", "alltoall") if reference else ("allreduce",):
            chosen = EngineSettings(weights="random", dtype="bfloat16", device=flags.device, exchange=exchange)
            worker = load_worker(plan, flags.shape, chosen, group)
            run = Run(plan, flags.shape, group, worker, None)
            if not reference:
                agreement = Agreement(run, {}, force=False)
                agreement.run_prompts()
                agreement.close()
                Path(flags.reference).mkdir(parents=True, exist_ok=True)
                save_file(agreement.recorded, record)
            rows += measure(run, reference, benchmark)
            del worker, run
            gc.collect()  # a shard and its experts module refer to each other
            if group.device.type == "cuda":
                torch.cuda.empty_cache()
    if group.rank == 0:
        from runtime.bench import describe_machine

        document = describe_machine(group) | {"rows": rows}
        Path(flags.output).write_text(json.dumps(document, indent=1) + "\n")
    group.close()


if __name__ == "__main__":
    main()

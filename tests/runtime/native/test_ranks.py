"""Several ranks decode natively what one does: any plan, every family, the same bits on every rank."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from runtime.native.families import DecoderShape, read_shape
from runtime.native.heads import HeadShare
from runtime.native.weights import allocate
from tests.support.native import Recording, drive, native_model
from tests.support.native_ranks import FailingJob, NativeJob, ServingJob
from tests.support.plans import make_plan
from tests.support.rank_pool import RankPool
from tests.support.tiny_models import tiny_model

GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
ROOT = Path(__file__).resolve().parents[3]
NEW_TOKENS = 6
GENERATOR = random.Random(0)
PROMPTS = [[GENERATOR.randrange(4, 120) for _ in range(length)] for length in (5, 17, 30)]
ARRIVALS = [0, 0, 3]
FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
KIND = {2: "replicated", 4: "uneven"}  # copies that split; slots from none to many, and a copy


@cache
def alone(path: str) -> Recording:
    return drive(native_model(path), PROMPTS, ARRIVALS, NEW_TOKENS)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_one_rank(
    family: str, ranks: int, rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model(family)
    plan = make_plan(path, KIND[ranks], ranks).to_dict()
    found = rank_pool(ranks).run(NativeJob(path, plan, PROMPTS, ARRIVALS, NEW_TOKENS))
    expected = alone(path)
    for number in range(len(PROMPTS)):
        logits = np.stack(found[0].logits[number])
        np.testing.assert_allclose(logits, np.stack(expected.logits[number]), rtol=0, atol=1e-4)
        assert found[0].tokens[number] == expected.tokens[number]
        for other in found[1:]:
            np.testing.assert_array_equal(np.stack(other.logits[number]), logits)
            assert other.tokens[number] == found[0].tokens[number]


def test_random_weights_are_one_model(rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "contiguous", 2).to_dict()
    found = rank_pool(2).run(NativeJob(path, plan, PROMPTS[:1], [0], 3, settings={"weights": "random"}))
    expected = drive(native_model(path, weights="random"), PROMPTS[:1], [0], 3)
    np.testing.assert_allclose(np.stack(found[1].logits[0]), np.stack(expected.logits[0]), rtol=0, atol=1e-4)


def test_an_engine_serves_on_ranks_and_sees_the_load_of_all(
    rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "uneven", 2)  # rank 1 has no slots
    served, _ = rank_pool(2).run(ServingJob(path, plan.to_dict(), PROMPTS, NEW_TOKENS))
    tokens, pairs, exchanged = served
    assert tokens == [alone(path).tokens[number] for number in range(len(PROMPTS))]
    fed = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS)
    assert [sum(map(sum, layer)) for layer in pairs] == [fed * plan.top_k] * plan.num_layers
    assert [[len(gpu) for gpu in layer] for layer in pairs] == [[len(gpu) for gpu in layer] for layer in plan.slots]
    row_bytes = 4 * AutoConfig.from_pretrained(path).hidden_size  # float32
    assert exchanged == 2 * plan.num_layers * fed * row_bytes


ROOM = 1 << 24


def test_a_rank_without_memory_stops_all(
    rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "contiguous", 2).to_dict()
    pool = rank_pool(2)
    fine, failed = pool.run(FailingJob(path, plan, (ROOM, 100)))
    assert fine[0] == "FailedElsewhereError"
    assert failed[0] == "ModelError"
    assert "0 MiB are left" in failed[1]
    assert pool.run(FailingJob(path, plan, (ROOM, ROOM))) == [("", "")] * 2


def test_a_rank_without_its_experts_stops_all(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    """The other rank must not go on: on GPUs it would capture steps, and wait in them without end."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    plan = make_plan(str(tmp_path), "contiguous", 2).to_dict()
    fine, failed = rank_pool(2).run(FailingJob(str(tmp_path), plan, (ROOM, ROOM)))
    assert fine[0] == "FailedElsewhereError"
    assert "lacks model.layers.1.mlp.experts.7.up_proj.weight" in failed[1]


@pytest.mark.parametrize(("family", "world", "ranks"), [
    ("qwen3_moe", 2, 2),
    ("qwen3_moe", 4, 4),  # two kv heads for four ranks
    ("qwen3_moe", 3, 1),
    ("olmoe", 2, 1),  # a norm over all heads
    ("deepseek_v2", 4, 4),
])  # fmt: skip
def test_heads_are_shared_out(family: str, world: int, ranks: int, saved_model: Callable[[str], str]) -> None:
    shape = read_shape(AutoConfig.from_pretrained(saved_model(family)))
    shares = [HeadShare.choose(shape, rank, world) for rank in range(world)]
    assert {share.ranks for share in shares} == {ranks}
    covered = np.zeros(shape.num_heads, dtype=int)
    for share in shares:
        for start, total in pieces_of_queries(shape, share):
            local = share.shape_of(shape).num_heads
            assert total == shape.num_heads
            covered[start : start + local] += 1
    assert (covered == (1 if ranks > 1 else world)).all()


@GPUS
@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite"])
def test_same_on_two_gpus(family: str, gpu_pool: RankPool, saved_model: Callable[[str], str]) -> None:
    path = saved_model(family)
    expected = drive(native_model(path, device="cuda", graphs=True), PROMPTS, ARRIVALS, NEW_TOKENS)
    plan = make_plan(path, "replicated", 2).to_dict()
    for dtype in ("float32", "bfloat16"):
        job = NativeJob(path, plan, PROMPTS, ARRIVALS, NEW_TOKENS, dtype, graphs=True)
        one, other = gpu_pool.run(job)
        for number in range(len(PROMPTS)):
            logits = np.stack(one.logits[number])
            np.testing.assert_array_equal(np.stack(other.logits[number]), logits)
            assert np.isfinite(logits).all()
            if dtype == "float32":
                np.testing.assert_allclose(logits, np.stack(expected.logits[number]), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[RankPool]:
    pool = RankPool(2, "cuda")
    yield pool
    pool.close()


@GPUS
@pytest.mark.gpu
def test_ten_thousand_steps_with_delays(saved_model: Callable[[str], str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tests.support.native_soak", saved_model("qwen3_moe"), "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pieces_of_queries(shape: DecoderShape, share: HeadShare) -> list[tuple[int, int]]:
    """First head and number of heads of the output projection's part in the first layer."""
    slots = dict.fromkeys(range(shape.num_layers), (0,))
    _, parts = allocate(share.shape_of(shape), slots, torch.float32, torch.device("meta"))
    outputs = [share.part_of(part) for part in parts if part.name == "model.layers.0.self_attn.o_proj.weight"]
    size = outputs[0].destination.shape[1] // share.shape_of(shape).num_heads
    return [(p.piece.start // size, p.piece.total // size) if p.piece else (0, shape.num_heads) for p in outputs]

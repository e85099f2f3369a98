"""Several ranks decode natively what one does: any plan, every family, every exchange mode."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from placement.plan import PlacementPlan
from runtime.native.families import DecoderShape, read_shape
from runtime.native.heads import HeadShare
from runtime.native.weights import allocate
from tests.support.native import Recording, drive, native_model
from tests.support.native_ranks import FailingJob, NativeJob, ReplayJob, ServingJob
from tests.support.plans import make_plan
from tests.support.rank_pool import RankPool
from tests.support.recorded import Recorded, check_recorded, read_recorded
from tests.support.tiny_models import tiny_model
from tests.support.triton_compile import in_interpreter

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


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_one_rank(
    family: str,
    ranks: int,
    exchange: str,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
) -> None:
    """In `alltoall` with 4 ranks one has no sequence, and the others begin and end at different times."""
    path = saved_model(family)
    plan = make_plan(path, KIND[ranks], ranks).to_dict()
    job = NativeJob(path, plan, PROMPTS, ARRIVALS, NEW_TOKENS, settings={"exchange": exchange})
    check_recordings(rank_pool(ranks).run(job), alone(path), exchange)


def check_recordings(found: Sequence[Recording], expected: Recording, exchange: str) -> None:
    """All ranks know the tokens; the logits are everywhere, with the same bits, or where the sequence is at home."""
    assert all(each.tokens == expected.tokens for each in found)
    for number in range(len(PROMPTS)):
        having = [each.logits[number] for each in found if number in each.logits]
        assert len(having) == (1 if exchange == "alltoall" else len(found))
        np.testing.assert_allclose(np.stack(having[0]), np.stack(expected.logits[number]), rtol=0, atol=1e-4)
        for other in having[1:]:
            np.testing.assert_array_equal(np.stack(other), np.stack(having[0]))


def test_alltoall_through_mailboxes(saved_model: Callable[[str], str], tmp_path: Path) -> None:
    """Decode steps of ranks whose mailboxes are files, the kernels in Triton's interpreter; prefills go over gloo."""
    path = saved_model("deepseek_v3")
    in_interpreter(
        f"""
        from tests.runtime.native.test_ranks import ARRIVALS, NEW_TOKENS, PROMPTS, alone, check_recordings
        from tests.support.native_ranks import MailboxJob
        from tests.support.plans import make_plan
        from tests.support.rank_pool import RankPool

        pool = RankPool(2)
        for kind in ("replicated", "shuffled"):  # the rule `level`, and one copy each
            plan = make_plan({path!r}, kind, 2).to_dict()
            memory = {str(tmp_path)!r} + "/" + kind
            settings = {{"exchange": "alltoall"}}
            job = MailboxJob({path!r}, plan, PROMPTS, ARRIVALS, NEW_TOKENS, settings=settings, memory=memory)
            check_recordings(pool.run(job), alone({path!r}), "alltoall")
        pool.close()
        """
    )


def test_ranks_replay_their_own_sequences_routes(
    rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model("gpt_oss")
    plan = make_plan(path, "replicated", 2).to_dict()
    job = ReplayJob(path, plan, PROMPTS, [], NEW_TOKENS, settings={"exchange": "alltoall"})
    for own, same, other in rank_pool(2).run(job):
        assert all(torch.equal(a, b) for a, b in zip(own, same, strict=True))
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(own, other, strict=True))


def test_random_weights_are_one_model(rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "contiguous", 2).to_dict()
    found = rank_pool(2).run(NativeJob(path, plan, PROMPTS[:1], [0], 3, settings={"weights": "random"}))
    expected = drive(native_model(path, weights="random"), PROMPTS[:1], [0], 3)
    np.testing.assert_allclose(np.stack(found[1].logits[0]), np.stack(expected.logits[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("exchange", "kind"), [("allreduce", "uneven"), ("alltoall", "uneven"), ("alltoall", "shuffled")]
)
def test_an_engine_serves_on_ranks_and_sees_the_load_of_all(
    exchange: str,
    kind: str,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
    tmp_path: Path,
) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, kind, 2, exchange)  # uneven: rank 1 has no slots
    asked = (3, None, 1)
    job = ServingJob(path, plan.to_dict(), PROMPTS, NEW_TOKENS, asked, str(tmp_path / "routes"))
    served, _ = rank_pool(2).run(job)
    assert served.tokens == [alone(path).tokens[number] for number in range(len(PROMPTS))]
    for likeliest, found, logits in zip(asked, served.logprobs, alone(path).logits.values(), strict=True):
        for one, row in zip(found, torch.from_numpy(np.stack(logits)).log_softmax(dim=1), strict=True):
            assert (one is None) == (likeliest is None)
            if one is not None:
                values = torch.tensor([one.chosen, *(value for _, value in one.top)])
                expected = row.topk(likeliest or 0).values
                torch.testing.assert_close(values, torch.cat([expected[:1], expected]), rtol=0, atol=1e-4)
    fed = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS)
    assert [sum(map(sum, layer)) for layer in served.pairs] == [fed * plan.top_k] * plan.num_layers
    assert [[len(gpu) for gpu in layer] for layer in served.pairs] == [
        [len(gpu) for gpu in layer] for layer in plan.slots
    ]
    traces = [tmp_path / "routes-0001.safetensors"]
    assert not check_recorded(traces, path, PROMPTS, NEW_TOKENS)
    row_bytes = 4 * AutoConfig.from_pretrained(path).hidden_size  # float32
    sent = plan.num_layers * fed * row_bytes
    if exchange == "alltoall":
        sent = count_visits(plan, read_recorded(traces)) * row_bytes + plan.num_layers * fed * 4 * plan.top_k
    assert served.exchanged_bytes == 2 * sent


def count_visits(plan: PlacementPlan, sequences: Sequence[Recorded]) -> int:
    """How often a row went to the other GPU, where prompts are dealt in turn and experts have one copy."""
    visits = 0
    for recorded in sequences:
        home = next(n for n, prompt in enumerate(PROMPTS) if list(recorded.token_ids[: len(prompt)]) == prompt) % 2
        for layer, gpus in enumerate(plan.slots):
            visits += int(np.isin(recorded.experts[:, layer], gpus[1 - home]).any(axis=1).sum())
    return visits


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
@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite"])
def test_same_on_two_gpus(family: str, exchange: str, gpu_pool: RankPool, saved_model: Callable[[str], str]) -> None:
    path = saved_model(family)
    plan = make_plan(path, "replicated", 2).to_dict()
    for dtype in ("float32", "bfloat16"):
        one_rank = native_model(path, device="cuda", dtype=getattr(torch, dtype), graphs=True)
        expected = drive(one_rank, PROMPTS, ARRIVALS, NEW_TOKENS)
        job = NativeJob(path, plan, PROMPTS, ARRIVALS, NEW_TOKENS, dtype, graphs=True, settings={"exchange": exchange})
        one, other = gpu_pool.run(job)
        assert one.tokens == other.tokens
        for number in range(len(PROMPTS)):
            found = [np.stack(each.logits[number]) for each in (one, other) if number in each.logits]
            assert len(found) == (1 if exchange == "alltoall" else 2)
            np.testing.assert_array_equal(found[0], found[-1])
            wanted = np.stack(expected.logits[number])
            if dtype == "float32":
                np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-3)
            else:  # of the first token; a near-tie may send the rest to other experts
                error = np.median(np.abs(found[0][0] - wanted[0])) / np.abs(wanted[0]).max()
                assert np.isfinite(found[0]).all()
                assert error < 2e-2


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[RankPool]:
    pool = RankPool(2, "cuda")
    yield pool
    pool.close()


@GPUS
@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_ten_thousand_steps_with_delays(exchange: str, saved_model: Callable[[str], str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tests.support.native_soak", saved_model("qwen3_moe"), "10000", exchange]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pieces_of_queries(shape: DecoderShape, share: HeadShare) -> list[tuple[int, int]]:
    """First head and number of heads of the output projection's part in the first layer."""
    slots = dict.fromkeys(range(shape.num_layers), (0,))
    _, parts = allocate(share.shape_of(shape), slots, torch.float32, torch.device("meta"))
    outputs = [share.part_of(part) for part in parts if part.name == "model.layers.0.self_attn.o_proj.weight"]
    size = outputs[0].destination.shape[1] // share.shape_of(shape).num_heads
    return [(p.piece.start // size, p.piece.total // size) if p.piece else (0, shape.num_heads) for p in outputs]

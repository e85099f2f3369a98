"""Evaluation by replay against a slow, obvious re-implementation, and against known figures of a real trace."""

import math
from dataclasses import replace

import numpy as np
import pytest

from placement.cluster import Cluster, Coefficient, Coefficients, Link
from placement.dispatch import dispatch_tokens, level_dispatch
from placement.errors import PlanError, ProblemError
from placement.evaluation import evaluate, evaluate_routes
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.strategies.contiguous import contiguous_plan
from placement.strategies.eplb import eplb_slots
from profiler.statistics import collect_statistics
from profiler.trace_format import RoutingTrace
from tests.support.routes import make_routes

LINK = Link(latency_s=1e-5, bytes_per_s=1e9)
SLOW_LINK = Link(latency_s=3e-5, bytes_per_s=1e8)


def make_cluster(nodes, gpus_per_node):
    coefficients = Coefficients(
        expert_bytes=1000,
        hidden_state_bytes=512,
        c0_us=Coefficient(3.0, "measured"),
        c1_us=Coefficient(2.0, "measured"),
        c2_us=Coefficient(0.5, "assumed"),
    )
    memory = (1e9,) * (nodes * gpus_per_node)
    return Cluster("test", nodes, gpus_per_node, memory, 1e12, 1e14, 3.0, LINK, LINK, SLOW_LINK, (coefficients,))


def busiest_port(bytes_between, members):
    """Most bytes that one GPU sends or receives over the given pairs of GPUs."""
    gpus = range(len(bytes_between))
    sent = [sum(bytes_between[u][v] for v in gpus if members(u, v)) for u in gpus]
    received = [sum(bytes_between[u][v] for u in gpus if members(u, v)) for v in gpus]
    return max(sent + received)


def exchange_us(cluster, bytes_between):
    """One exchange, in µs."""
    node = [gpu // cluster.gpus_per_node for gpu in range(cluster.num_gpus)]
    times = []
    if cluster.gpus_per_node > 1:
        busiest = busiest_port(bytes_between, lambda u, v: u != v and node[u] == node[v])
        times.append(LINK.latency_s + busiest / LINK.bytes_per_s)
    if cluster.nodes > 1:
        busiest = busiest_port(bytes_between, lambda u, v: node[u] != node[v])
        times.append(SLOW_LINK.latency_s + busiest / SLOW_LINK.bytes_per_s)
    return 1e6 * max(times)


def active_experts(experts, gpus, copies, homes, limit, num_gpus):
    """How many experts are active on each GPU: those with a pair there, and split ones wherever they have a copy."""
    left = [
        e
        for row, home in zip(experts.tolist(), homes, strict=True)
        for e in row
        if home not in copies[e][copies[e] >= 0]
    ]
    chosen = level_dispatch(np.bincount(left, minlength=len(copies)), copies, num_gpus, limit)
    active = set(zip(experts.ravel().tolist(), gpus.ravel().tolist(), strict=True))
    active |= {(e, gpu) for e in np.flatnonzero(chosen == -2).tolist() for gpu in copies[e].tolist() if gpu >= 0}
    return [sum(gpu == g for _, gpu in active) for g in range(num_gpus)]


def slow_metrics(plan, routes, cluster, batch_size, batches, seed):
    """The metrics of one batch size, token by token."""
    num_gpus, exchange, limit = plan.num_gpus, plan.workload.exchange, plan.dispatch.split_above_tokens
    node = np.arange(num_gpus) // cluster.gpus_per_node
    same_node = node[:, None] == node[None, :]
    collective = SLOW_LINK if cluster.nodes > 1 else LINK
    draws = np.random.default_rng(seed).integers(len(routes), size=(batches, batch_size))
    ratios, steps, touched, pairs, firsts, nvlink, network = [], [], [], [], [], 0, 0
    for number, draw in enumerate(draws):
        step = 0.0
        previous = None
        homes = [(token + number) % num_gpus for token in range(batch_size)]
        for layer in range(plan.num_layers):
            experts = routes[draw, layer].astype(int)
            copies = plan.copies(layer)
            rule_homes = homes if plan.dispatch.rule == "nearest" and exchange != "allreduce" else [-1] * batch_size
            gpus = dispatch_tokens(experts, copies, num_gpus, limit, rule_homes)
            active = active_experts(experts, gpus, copies, rule_homes, limit, num_gpus)
            ratios.append(max(active) / math.ceil(len(np.unique(experts)) / num_gpus))
            tokens = [int((gpus == gpu).sum()) for gpu in range(num_gpus)]
            step += max(3.0 * (a > 0) + 2.0 * a + 0.5 * t for a, t in zip(active, tokens, strict=True))
            there, back = np.zeros((2, num_gpus, num_gpus))
            for token, row in enumerate(gpus):
                touched.append(len(set(row)))
                for gpu in set(row.tolist()):
                    there[homes[token]][gpu] += 512
                    back[gpu][row[0] if exchange == "coherent" else homes[token]] += 512
                if previous is not None:
                    pairs += [a == b for a in previous[token] for b in row]
                    firsts.append(previous[token][0] == row[0])
            if num_gpus > 1 and exchange == "allreduce":
                step += 1e6 * (collective.latency_s + 2 * batch_size * 512 / collective.bytes_per_s)
                there, back = (np.roll(np.eye(num_gpus), 1, axis=1) * batch_size * 512 * (1 - 1 / num_gpus),) * 2
            elif num_gpus > 1:
                step += exchange_us(cluster, there) + exchange_us(cluster, back)
                step += 1e6 * (collective.latency_s + experts.size * 2 / collective.bytes_per_s)
            moved = (there + back) * ~np.eye(num_gpus, dtype=bool)
            nvlink, network = nvlink + (moved * same_node).sum(), network + (moved * ~same_node).sum()
            if exchange == "coherent":
                homes = gpus[:, 0].tolist()
            previous = gpus
        steps.append(step)
    return {
        "active_ratio": np.mean(ratios),
        "step_us": np.mean(steps),
        "gpus_per_token": np.mean(touched),
        "pair_locality": np.mean(pairs),
        "top1_transition_locality": np.mean(firsts),
        "nvlink_bytes": nvlink / batches,
        "network_bytes": network / batches,
    }


COPIED = (
    ((0, 1, 2, 3, 6), (2, 4, 5, 6, 7), (0, 3, 4), (1, 7)),
    ((7, 6, 5), (4, 3), (2, 1, 7), (0, 3, 6, 5)),
    ((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3), (4,), ()),
)


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall", "coherent"])
@pytest.mark.parametrize(
    ("nodes", "limit", "rule"), [(1, None, "level"), (2, 3, "level"), (4, 0, "nearest"), (2, 3, "nearest")]
)
def test_replay_of_copies_equals_the_slow_way(exchange, nodes, limit, rule):
    routes = make_routes(5, 60, 3, 8, 2)
    cluster = make_cluster(nodes, 4 // nodes)
    plan = PlacementPlan(
        "model", 8, 2, (0, 1, 2), COPIED, workload=Workload(exchange=exchange), dispatch=Dispatch(rule, limit)
    )
    for batch_size in (1, 9):
        metrics = evaluate_routes(plan, routes, cluster, [batch_size], batches=25, seed=3)
        expected = slow_metrics(plan, routes, cluster, batch_size, 25, 3)
        got = metrics.by_batch_size[batch_size]
        for name, value in expected.items():
            assert getattr(got, name) == pytest.approx(value), name
        assert got.step_us == pytest.approx(got.expert_us + got.exchange_us)


def test_nearest_keeps_more_than_level_where_tokens_have_a_home():
    routes = make_routes(5, 60, 3, 8, 2)
    found = {}
    for exchange in ("allreduce", "coherent"):
        for rule in ("level", "nearest"):
            plan = PlacementPlan(
                "model", 8, 2, (0, 1, 2), COPIED, workload=Workload(exchange=exchange), dispatch=Dispatch(rule)
            )
            found[exchange, rule] = evaluate_routes(plan, routes, make_cluster(1, 4), [6], batches=50).by_batch_size[6]
    assert found["allreduce", "nearest"] == found["allreduce", "level"]
    assert found["coherent", "nearest"].pair_locality > found["coherent", "level"].pair_locality
    assert found["coherent", "nearest"].nvlink_bytes < found["coherent", "level"].nvlink_bytes


def test_without_copies_locality_is_exact_over_all_tokens():
    routes = make_routes(6, 300, 3, 8, 2).astype(np.uint8)
    plan = contiguous_plan("model", 8, 2, [0, 1, 2], 4)
    gpu = routes // 2
    pair = np.mean([gpu[:, :-1, i] == gpu[:, 1:, j] for i in range(2) for j in range(2)])
    top1 = (gpu[:, :-1, 0] == gpu[:, 1:, 0]).mean()
    distinct = np.mean([len(set(row)) for row in gpu.reshape(-1, 2).tolist()])
    load = [np.bincount(gpu[:, layer].ravel(), minlength=4).max() / 150 for layer in range(3)]
    metrics = evaluate_routes(plan, routes, make_cluster(1, 4), [1, 7], batches=10)
    for by_size in metrics.by_batch_size.values():
        assert by_size.pair_locality == pytest.approx(pair)
        assert by_size.top1_transition_locality == pytest.approx(top1)
        assert by_size.gpus_per_token == pytest.approx(distinct)
    assert metrics.load_mean == pytest.approx(np.mean(load))
    assert metrics.load_max == pytest.approx(max(load))
    slow = slow_metrics(plan, routes, make_cluster(1, 4), 7, 10, 0)
    assert metrics.by_batch_size[7].active_ratio == pytest.approx(slow["active_ratio"])
    assert metrics.by_batch_size[7].step_us == pytest.approx(slow["step_us"])


def test_one_gpu_and_one_layer():
    routes = make_routes(0, 40, 1, 4, 2)
    metrics = evaluate_routes(contiguous_plan("model", 4, 2, [0], 1), routes, make_cluster(1, 1), [3], batches=5)
    by_size = metrics.by_batch_size[3]
    assert (metrics.load_max, by_size.active_ratio, by_size.gpus_per_token) == (1.0, 1.0, 1.0)
    assert (by_size.pair_locality, by_size.exchange_us) == (1.0, 0.0)


def test_chunks_do_not_change_the_result(monkeypatch):
    routes = make_routes(7, 100, 3, 8, 2)
    plan = PlacementPlan("model", 8, 2, (0, 1, 2), COPIED)
    whole = evaluate_routes(plan, routes, make_cluster(1, 4), [4], batches=50)
    monkeypatch.setattr("placement.evaluation.VALUES_AT_ONCE", 100)
    parts = evaluate_routes(plan, routes, make_cluster(1, 4), [4], batches=50)
    assert parts.to_dict()["step_us"]["4"] == pytest.approx(whole.to_dict()["step_us"]["4"])


def test_single_tokens_use_every_gpu_as_a_home():
    """A plan with everything on GPU 0 sends nothing only where a token happens to live there."""
    routes = make_routes(1, 40, 1, 8, 2)
    plan = PlacementPlan("model", 8, 2, (0,), ((tuple(range(8)), (), (), ()),), workload=Workload(exchange="alltoall"))
    figures = evaluate_routes(plan, routes, make_cluster(1, 4), [1], batches=40).by_batch_size[1]
    assert figures.nvlink_bytes == 2 * 512 * 3 / 4


def test_few_steps_of_many_tokens():
    routes = make_routes(2, 50, 2, 8, 2)
    plan = contiguous_plan("model", 8, 2, [0, 1], 4)
    metrics = evaluate_routes(plan, routes, make_cluster(1, 4), [4, 2**12, 2**15], batches=300)
    assert [len(metrics.samples[size].step_us) for size in (4, 2**12, 2**15)] == [300, 128, 64]


@pytest.mark.parametrize("slots", [COPIED, contiguous_plan("model", 8, 2, range(3), 4).slots])
def test_sums_by_sequence_give_the_means_and_those_of_resamples(slots):
    routes = make_routes(7, 90, 3, 8, 2)
    sequence = np.repeat([7, 3, 11], [20, 30, 40])
    plan = PlacementPlan("model", 8, 2, (0, 1, 2), slots)
    cluster = make_cluster(1, 4)
    metrics = evaluate_routes(plan, routes, cluster, [1, 4], batches=200, sequence_T=sequence)
    assert metrics == evaluate_routes(plan, routes, cluster, [1, 4], batches=200)
    for size, figures in metrics.by_batch_size.items():
        samples = metrics.samples[size]
        assert samples.step_us.shape == samples.active_ratio.shape == (200,)
        assert samples.step_us.mean() == pytest.approx(figures.step_us)
        assert samples.active_ratio.mean() == pytest.approx(figures.active_ratio)
        means = [figures.gpus_per_token, figures.pair_locality, figures.top1_transition_locality]
        assert samples.token_sums.means()[0].tolist() == means
        assert samples.token_sums.tokens.sum() == (200 * size if plan.has_copies else 90)
    if plan.has_copies:
        return
    # Without copies a resample is what the same sequences alone give; ids stand in ascending order: 3, 7, 11.
    alone = evaluate_routes(plan, routes[sequence != 11], cluster, [1], batches=1)
    figures = alone.by_batch_size[1]
    resampled = metrics.samples[1].token_sums.means(np.array([[2, 2, 0]]))[0]
    assert resampled == pytest.approx([figures.gpus_per_token, figures.pair_locality, figures.top1_transition_locality])
    loads = np.tensordot([2, 2, 0], metrics.sequence_loads, axes=1)
    assert (loads.max(axis=1) / loads.mean(axis=1)).max() == pytest.approx(alone.load_max)


def test_only_the_split_asked_for_is_replayed(small_trace):
    plan = contiguous_plan("test-model", 8, 2, range(4), 4)
    cluster = make_cluster(1, 4)
    with RoutingTrace.open(small_trace) as trace:
        experts = trace.experts()[trace.split_mask("odd")]
        judged = evaluate(plan, trace, cluster, batch_sizes=[2], batches=20)
        assert judged == evaluate_routes(plan, experts, cluster, [2], batches=20)
        assert judged != evaluate(plan, trace, cluster, split="even", batch_sizes=[2], batches=20)
        with pytest.raises(PlanError, match="the plan is for"):
            evaluate(contiguous_plan("model", 16, 2, range(4), 4), trace, cluster)
        with pytest.raises(ProblemError, match="2 GPUs"):
            evaluate(plan, trace, make_cluster(1, 2))


def test_real_trace_known_figures(real_trace):
    """Figures of gpt-oss-20b that were computed before this code: contiguous, and copies by EPLB's rule."""
    cluster = make_cluster(1, 4)
    plan = contiguous_plan(real_trace.model, 32, 4, real_trace.layer_ids, 4)
    metrics = evaluate(plan, real_trace, cluster, batch_sizes=[1, 4, 32]).to_dict()
    assert metrics["pair_locality"]["1"] == pytest.approx(0.247, abs=0.001)
    assert metrics["top1_transition_locality"]["1"] == pytest.approx(0.233, abs=0.001)
    assert metrics["load_mean"] == pytest.approx(1.16, abs=0.01)
    for size, ratio in (("1", 1.88), ("4", 1.25), ("32", 1.08)):
        assert metrics["active_ratio"][size] == pytest.approx(ratio, abs=0.015)
    popularity = collect_statistics(real_trace, real_trace.split_mask("even")).popularity
    copied = replace(plan, slots=eplb_slots(popularity, [16] * 4))
    ratios = evaluate(copied, real_trace, cluster, batch_sizes=[1, 4]).to_dict()["active_ratio"]
    assert ratios["1"] == pytest.approx(1.08, abs=0.02)
    assert ratios["4"] == pytest.approx(1.00, abs=0.005)

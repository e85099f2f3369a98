"""Every strategy on every objective: whatever the problem, the plan is valid and what is said of it is true."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster import Cluster, Link
from placement.errors import ProblemError
from placement.migration import num_moves
from placement.plan import Workload
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots, sorted_slots
from placement.strategies import STRATEGIES, solve
from profiler.statistics import RoutingStatistics
from tests.support.routes import count_routes

OBJECTIVES = {
    "locality": Objective("locality"),
    "locality of first choices": Objective("locality", pairs="top1"),
    "locality with bounded load": Objective("locality", max_load=1.3),
    "balance": Objective("balance"),
    "step_time": Objective("step_time"),
}
#: Strategies that refuse an objective, always and in so many words; none but these may.
REFUSED = {("ilp", "step_time"): "strategy ilp with objective step_time"}
RUNS = [(strategy, name) for strategy in sorted(STRATEGIES) for name in OBJECTIVES if (strategy, name) not in REFUSED]
#: Objectives of which more is better.
MAXIMISED = {"locality"}


def make_cluster(num_gpus, gpus_per_node):
    fast, slow = Link(1e-5, 4e11), Link(2e-5, 5e10)
    nodes = num_gpus // gpus_per_node
    bare = Cluster("test", nodes, gpus_per_node, (1e9,) * num_gpus, 4e12, 6e14, 5.0, fast, fast, slow)
    return replace(bare, coefficients=(bare.coefficients_for(1_000_000, 4096),))


def random_routes(seed, num_tokens, num_layers, num_experts, seen, top_k):
    """Routes [T, L, K] among ``seen`` experts of each layer, skewed and with affinity; the others get no token."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=num_tokens)
    score = rng.gumbel(size=(3, num_layers, num_experts))[topic] * 2 + rng.gumbel(size=(num_tokens, num_layers, 1))
    score = score + rng.gumbel(size=score.shape)
    for layer in range(num_layers):
        score[:, layer, rng.permutation(num_experts)[seen:]] = -np.inf
    return np.argsort(-score, axis=2)[:, :, :top_k]


@st.composite
def budgets(draw, num_experts, num_gpus):
    """Uneven slots, GPUs without any, and often exactly one slot per expert."""
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_gpus, max_size=num_gpus))
    excess = sum(slots) - num_experts
    if excess < 0 or draw(st.booleans()):
        for gpu in range(num_gpus):
            change = min(max(excess, slots[gpu] - num_experts), slots[gpu])
            slots[gpu] -= change
            excess -= change
    return tuple(slots)


@st.composite
def problems(draw, objective, most_layers=4, most_experts=10, most_gpus=5):
    num_layers, num_experts = draw(st.integers(1, most_layers)), draw(st.integers(1, most_experts))
    num_gpus = draw(st.integers(1, most_gpus))
    top_k = draw(st.integers(1, min(4, num_experts)))
    seen = draw(st.integers(top_k, num_experts))
    routes = random_routes(
        draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 60)), num_layers, num_experts, seen, top_k
    )
    per_node = draw(st.sampled_from([size for size in range(1, num_gpus + 1) if num_gpus % size == 0]))
    statistics = count_routes(routes, num_experts)
    sequences = draw(st.sampled_from([None, np.arange(len(routes)) // 7, np.arange(len(routes)) % 3]))
    if objective.name != "step_time" and draw(st.integers(0, 3)) == 0:  # counts alone, one layer never used
        routes = sequences = None
        statistics = without_layer(statistics, draw(st.integers(0, num_layers - 1)))
    return PlacementProblem(
        statistics,
        draw(budgets(num_experts, num_gpus)),
        objective,
        cluster=make_cluster(num_gpus, per_node),
        routes=routes,
        sequences=sequences,
        workload=Workload(
            "decode",
            draw(st.sampled_from([(1,), (2, 8)])),
            draw(st.sampled_from(["allreduce", "alltoall", "coherent"])),
        ),
    )


def without_layer(statistics, layer):
    """The same statistics with no count in one layer."""
    fields = {}
    for name in ("popularity", "top1_popularity", "affinity", "top1_affinity", "coactivation"):
        counts = getattr(statistics, name).copy()
        counts[max(0, layer - 1) if "affinity" in name else layer : layer + 1] = 0
        fields[name] = counts
    return RoutingStatistics(num_tokens=statistics.num_tokens, **fields)


def other_placements(problem, seed):
    """A few random placements within the budget that use its spare slots."""
    rng = np.random.default_rng(seed)
    experts, gpus = np.arange(problem.num_experts), range(problem.num_gpus)
    places = np.repeat(np.arange(problem.num_gpus), problem.slots_per_gpu)
    for _ in range(10):
        layers = []
        for _ in range(problem.num_layers):
            home = rng.permutation(places)[: problem.num_experts]
            held = [experts[home == gpu] for gpu in gpus]
            spare = [problem.slots_per_gpu[gpu] - len(held[gpu]) for gpu in gpus]
            extra = [rng.choice(np.setdiff1d(experts, held[gpu]), spare[gpu], replace=False) for gpu in gpus]
            layers.append([np.concatenate(pair) for pair in zip(held, extra, strict=True)])
        yield sorted_slots(layers)


def check_solution(problem, solution, name):
    """Placement, budget, value, load bound and notes."""
    check_slots(solution.slots, problem.num_experts, range(problem.num_layers))
    assert len(solution.slots[0]) == problem.num_gpus
    for gpus in solution.slots:
        assert all(len(held) <= slots for held, slots in zip(gpus, problem.slots_per_gpu, strict=True))
        assert all(type(expert) is int for held in gpus for expert in held)
    assert solution.name == name
    assert np.isfinite(solution.value)
    assert solution.value == pytest.approx(problem.value(solution.slots), rel=1e-12)
    assert problem.within_load_bound(solution.slots) != any("does not keep to max_load" in n for n in solution.notes)
    assert all("\n" not in note for note in solution.notes)


def check_bound(problem, solution, seed):
    """The bound is on the right side of the value and of whatever other placements reach."""
    if solution.bound is None:
        assert (solution.gap, solution.optimal) == (None, False)
        return
    sign = 1 if problem.objective.name in MAXIMISED else -1
    assert solution.gap == pytest.approx(abs(solution.bound - solution.value) / max(abs(solution.value), 1e-12))
    assert solution.optimal == (solution.gap <= 1e-9)
    for slots in [solution.slots, *other_placements(problem, seed)]:
        if problem.within_load_bound(slots):
            assert sign * (solution.bound - problem.value(slots)) >= -1e-9 * max(1.0, abs(solution.value))


@pytest.mark.parametrize(("strategy", "objective"), RUNS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_plan_is_valid_and_its_bound_holds(strategy, objective, data):
    problem = data.draw(problems(OBJECTIVES[objective]))
    solver = SolverSettings(time_limit_s=1.0, search_rounds=10)
    lines = []
    try:
        solution = solve(strategy, problem, solver, lines.append)
    except ProblemError as error:
        message = str(error)
        assert problem.objective.max_load is not None, message
        assert message.startswith("objective.max_load 1.3"), message
        assert "\n" not in message
        assert not any(map(problem.within_load_bound, other_placements(problem, 0)))
        return
    check_solution(problem, solution, strategy)
    check_bound(problem, solution, 0)
    assert all(line and "\n" not in line for line in lines)


@pytest.mark.parametrize(("strategy", "objective"), RUNS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_the_same_seed_gives_the_same_plan(strategy, objective, data):
    """The time limit is far away: only where it cuts may plans differ."""
    problem = data.draw(problems(OBJECTIVES[objective], most_layers=3, most_experts=6, most_gpus=3))
    solver = SolverSettings(seed=data.draw(st.integers(0, 9)), time_limit_s=30.0, search_rounds=10)
    plans = []
    for _ in range(2):
        try:
            plans.append(solve(strategy, problem, solver).slots)
        except ProblemError as error:
            assert problem.objective.max_load is not None
            plans.append(str(error))
    assert plans[0] == plans[1]


@settings(max_examples=15, deadline=None)
@given(problems(OBJECTIVES["step_time"]), st.integers(0, 10**6), st.sampled_from([0, 1, 3, 100]))
def test_a_running_plan_changes_by_no_more_moves_than_allowed_and_for_the_better(problem, seed, max_moves):
    running = next(other_placements(problem, seed))
    problem = replace(problem, running=running, max_moves=max_moves)
    solution = solve("step_time", problem, SolverSettings(time_limit_s=1.0, search_rounds=10))
    check_solution(problem, solution, "step_time")
    check_bound(problem, solution, seed)
    assert num_moves(running, solution.slots) <= max_moves
    assert solution.value <= problem.value(running) * (1 + 1e-12)


@pytest.mark.parametrize(("strategy", "objective"), REFUSED)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_an_objective_that_a_strategy_lacks_is_refused(strategy, objective, data):
    problem = data.draw(problems(OBJECTIVES[objective]))
    with pytest.raises(ProblemError, match=REFUSED[strategy, objective]) as caught:
        solve(strategy, problem, SolverSettings(time_limit_s=1.0))
    assert "\n" not in str(caught.value)

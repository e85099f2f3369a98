"""Bad input: one line that names the value and the remedy, whatever the strategy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster import Cluster, Link
from placement.errors import ProblemError
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.strategies import solve
from tests.support.routes import count_routes, make_routes

ROUTES = make_routes(0, 50, 3, 6, 2)
STATISTICS = count_routes(ROUTES, 6)
FIELDS = ("popularity", "top1_popularity", "affinity", "top1_affinity", "coactivation")
#: What an engine's recording of counts alone tells.
COUNTS_ALONE = replace(
    STATISTICS,
    affinity=np.zeros((0, 6, 6), np.int64),
    top1_affinity=np.zeros((0, 6, 6), np.int64),
    coactivation=np.zeros((0, 6, 6), np.int64),
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FIELDS), st.integers(0, 10**6), st.sampled_from([-1, np.nan, np.inf, 0.5]))
def test_a_count_that_no_trace_can_have_is_refused(name, place, value):
    counts = getattr(STATISTICS, name).astype(np.int64 if value == -1 else np.float64)
    counts.flat[place % counts.size] = value
    with pytest.raises(ProblemError, match=rf"^{name} holds (a negative count \(-1\)|float64 values)") as caught:
        PlacementProblem(replace(STATISTICS, **{name: counts}), (3, 3), Objective("balance"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_counts_of_another_shape_are_refused(name):
    with pytest.raises(ProblemError, match=r"the shape \[.*\]"):
        PlacementProblem(
            replace(STATISTICS, **{name: getattr(STATISTICS, name)[..., :5]}), (3, 3), Objective("balance")
        )
    with pytest.raises(ProblemError, match="expected"):
        PlacementProblem(replace(STATISTICS, popularity=STATISTICS.popularity[0]), (3, 3), Objective("balance"))


@pytest.mark.parametrize("strategy", ["contiguous", "random", "eplb", "ilp"])
def test_counts_alone_do_for_balance(strategy):
    problem = PlacementProblem(COUNTS_ALONE, (4, 4), Objective("balance"))
    solution = solve(strategy, problem, SolverSettings(time_limit_s=1.0))
    assert solution.value >= 1 - 1e-9


@pytest.mark.parametrize("objective", ["locality", "step_time"])
def test_objectives_that_need_more_refuse_counts_alone(objective):
    with pytest.raises(ProblemError, match=f"objective {objective} needs .* counts alone"):
        solve("contiguous", PlacementProblem(COUNTS_ALONE, (3, 3), Objective(objective)), SolverSettings())


RUNNING = (((0, 1, 2), (3, 4, 5)),) * 3


@pytest.mark.parametrize(
    ("running", "max_moves", "message"),
    [
        (RUNNING[:2], None, "does not fit the statistics: slots has 2 layers"),
        ((((0, 1, 2), (3, 4)),) * 3, None, "expert 5 is on no GPU"),
        ((((0, 1, 2), (3, 4), (5,)),) * 3, None, "is for 3 GPUs, slots_per_gpu for 2"),
        ((((0, 1, 2, 3), (3, 4, 5)),) * 3, None, r"needs slots_per_gpu \[4, 3\], given are \[3, 3\]"),
        (RUNNING, -1, "max_moves -1"),
        (RUNNING, True, "max_moves True"),
        (None, 5, "max_moves 5 without a running plan"),
    ],
)
def test_a_running_plan_that_does_not_fit_is_refused(running, max_moves, message):
    with pytest.raises(ProblemError, match=message):
        PlacementProblem(STATISTICS, (3, 3), Objective("balance"), running=running, max_moves=max_moves)


@pytest.mark.parametrize(
    "routes",
    [ROUTES[:, :2], ROUTES[:, :, 0], ROUTES.astype(float), ROUTES + 5, ROUTES - 1],
    ids=["layers", "dimensions", "dtype", "too large", "negative"],
)
def test_routes_that_do_not_fit_are_refused(routes):
    with pytest.raises(ProblemError, match=r"^routes \[.*expected integers \[tokens, 3, choices\] from 0 to 5"):
        PlacementProblem(STATISTICS, (3, 3), Objective("step_time"), routes=routes)


def test_a_cluster_of_another_size_is_refused():
    link = Link(0.0, 1e9)
    cluster = Cluster("four", 1, 4, (1e9,) * 4, 1e12, 1e14, 5.0, link, link, link)
    with pytest.raises(ProblemError, match="is for 2 GPUs, cluster four has 4"):
        PlacementProblem(STATISTICS, (3, 3), Objective("balance"), cluster)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "5", None])
def test_a_time_limit_that_is_none_is_refused(limit):
    with pytest.raises(ProblemError, match=r"solver\.time_limit_s .* above 0"):
        SolverSettings(time_limit_s=limit)

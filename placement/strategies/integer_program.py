"""Solving PuLP models with HiGHS or CBC, and saying truly what came out.

PuLP reports "Optimal" after a time-out, CBC may overrun its limit by minutes, and only HiGHS tells its bound: the
result here is what is known for certain. Every model minimises.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pulp

from placement.errors import ProblemError
from placement.problem import SolverSettings

#: CBC checks its limit between nodes only; this long after it, it is killed.
CBC_GRACE_S = 5.0


@dataclass(frozen=True)
class MipResult:
    """What is known after solving a minimisation.

    Attributes:
        feasible: the variables hold a feasible integer solution.
        infeasible: proven to have none.
        bound: no solution is below this; -inf where unknown.
        interrupted: Ctrl-C was pressed; what was found until then counts.
    """

    feasible: bool
    infeasible: bool
    bound: float
    interrupted: bool = False


def solve_model(
    model: pulp.LpProblem, settings: SolverSettings, time_limit_s: float, gap_rel: float = 0.0, gap_abs: float = 0.0
) -> MipResult:
    """Solve a model; values are left in its variables.

    Args:
        model: a minimisation; variables with initial values are a warm start for HiGHS, if all have one.
        settings: backend and threads.
        time_limit_s: hard limit.
        gap_rel, gap_abs: stop when value and bound are this close (HiGHS; CBC solves to the end).

    Raises:
        ProblemError: the backend asked for is not installed.
    """
    if settings.backend == "highs" or (settings.backend == "auto" and find_spec("highspy") is not None):
        return _solve_with_highs(model, settings, time_limit_s, gap_rel, gap_abs)
    return _solve_with_cbc(model, settings, time_limit_s)


class _InterruptibleHiGHS(pulp.HiGHS):
    """PuLP's HiGHS with a warm start, stopped by Ctrl-C with what it has found."""

    interrupted = False

    def callSolver(self, lp: pulp.LpProblem) -> None:
        import highspy

        highs = lp.solverModel
        if all(variable.varValue is not None for variable in lp.variables()):
            start = highspy.HighsSolution()
            start.col_value = [float(variable.varValue) for variable in lp.variables()]
            highs.setSolution(start)
        highs.HandleUserInterrupt = True
        highs.startSolve()
        done = False
        while not done:
            try:
                done, _ = highs.wait(0.2)
            except KeyboardInterrupt:
                self.interrupted = True
                highs.cancelSolve()


def _solve_with_highs(
    model: pulp.LpProblem, settings: SolverSettings, time_limit_s: float, gap_rel: float, gap_abs: float
) -> MipResult:
    if find_spec("highspy") is None:
        raise ProblemError("solver.backend highs: highspy is not installed; pip install highspy, or use backend cbc")
    solver = _InterruptibleHiGHS(
        msg=False,
        gapRel=gap_rel,
        gapAbs=gap_abs,
        threads=settings.threads,
        timeLimit=time_limit_s,
        random_seed=settings.seed % (2**31),
    )
    model.solve(solver)
    bound = float(model.solverModel.getInfo().mip_dual_bound)
    infeasible = model.status == pulp.LpStatusInfeasible
    feasible = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    return MipResult(
        feasible=feasible and math.isfinite(model.solverModel.getInfo().objective_function_value),
        infeasible=infeasible,
        bound=bound if math.isfinite(bound) and not infeasible else -math.inf,
        interrupted=solver.interrupted,
    )


class _BoundedCBC(pulp.COIN_CMD):
    """PuLP's CBC in a process that is killed at the limit."""

    def solve_CBC(self, lp: pulp.LpProblem, use_mps: bool = True) -> int:
        with tempfile.TemporaryDirectory() as folder:
            mps, answer = os.path.join(folder, "model.mps"), os.path.join(folder, "model.sol")
            variables, variable_names, constraint_names, _ = lp.writeMPS(mps, rename=True)
            limit = ["-sec", str(self.timeLimit), "-timeMode", "elapsed"]
            command = [self.path, mps, *limit, *self.options, "-solve", "-printingOptions", "all", "-solution", answer]
            try:
                subprocess.run(command, check=True, timeout=self.timeLimit + CBC_GRACE_S, capture_output=True)
            except subprocess.TimeoutExpired:
                lp.assignStatus(pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound)
                return int(pulp.LpStatusNotSolved)
            except subprocess.CalledProcessError as error:
                raise ProblemError(f"CBC ended with exit code {error.returncode}; use solver.backend=highs") from None
            read: tuple[Any, ...] = self.readsol_MPS(answer, lp, variables, variable_names, constraint_names)
        status, values, sol_status = read[0], read[1], read[5]
        lp.assignVarsVals(values)
        lp.assignStatus(status, sol_status)
        return int(status)


def _solve_with_cbc(model: pulp.LpProblem, settings: SolverSettings, time_limit_s: float) -> MipResult:
    path = pulp.PULP_CBC_CMD.pulp_cbc_path
    solver = _BoundedCBC(
        path=path, msg=False, timeLimit=time_limit_s, options=["-randomCbcSeed", str(settings.seed % 2**31)]
    )
    if not solver.available():
        raise ProblemError("solver.backend cbc: no CBC program was found; pip install pulp[cbc], or use backend highs")
    try:
        model.solve(solver)
    except KeyboardInterrupt:
        return MipResult(feasible=False, infeasible=False, bound=-math.inf, interrupted=True)
    optimal = model.sol_status == pulp.LpSolutionOptimal
    return MipResult(
        feasible=optimal or model.sol_status == pulp.LpSolutionIntegerFeasible,
        infeasible=model.status == pulp.LpStatusInfeasible,
        bound=float(pulp.value(model.objective)) if optimal else -math.inf,
    )

"""Settings of the command line, from composed configuration to the dataclasses that everything below takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast, get_args

from placement.cluster import Cluster
from placement.errors import ClusterError, ProblemError
from placement.held_out import HeldOut
from placement.memory import MemoryBudget, SlotRequest
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, ObjectiveName, Pairs, SolverSettings
from placement.slots import is_int

T = TypeVar("T")

#: Rows of ``compare`` by name: the strategy and the objective it is given. Baselines have goals of their own and take
#: the objective for their value alone. ``bounded_locality`` keeps to ``max_load``.
COMPARED: dict[str, tuple[str, ObjectiveName]] = {
    "contiguous": ("contiguous", "locality"),
    "random": ("random", "locality"),
    "eplb": ("eplb", "locality"),
    "eplb_hierarchical": ("eplb_hierarchical", "locality"),
    "lina": ("lina", "locality"),
    "exflow": ("exflow", "locality"),
    "moetuner": ("moetuner", "locality"),
    "locality": ("ilp", "locality"),
    "bounded_locality": ("ilp", "locality"),
    "balance": ("ilp", "balance"),
    "step_time": ("step_time", "step_time"),
}
#: Strategies that optimise the objective they are given.
FOLLOWS_OBJECTIVE = frozenset({"ilp", "step_time"})
#: Fewer resamples have nothing between the ends of a 95% interval and their own ends.
LEAST_RESAMPLES = 40


@dataclass(frozen=True)
class Judge:
    """How plans are judged.

    Attributes:
        batches: steps drawn per batch size.
        seed: of the draw of steps, and of resamples.
        resamples: for bootstrap intervals, where there are any.
    """

    batches: int = 2000
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name, value, least in (("batches", self.batches, 1), ("seed", self.seed, 0)):
            if not is_int(value) or value < least:
                raise ProblemError(f"judge.{name} {value!r}: expected an integer of at least {least}")
        if not is_int(self.resamples) or self.resamples < LEAST_RESAMPLES:
            raise ProblemError(
                f"judge.resamples {self.resamples!r}: expected an integer of at least {LEAST_RESAMPLES}, so that the "
                "95% intervals have ends"
            )


@dataclass(frozen=True)
class ModelSize:
    """Sizes in bytes that predictions need: one expert in one layer, one token's hidden state."""

    expert_bytes: int
    hidden_state_bytes: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not is_int(value) or value < 1:
                raise ProblemError(f"{name} {value!r}: expected an integer number of bytes above 0")


@dataclass(frozen=True)
class SolveSettings:
    """Settings of ``solve``."""

    cluster: Cluster
    workload: Workload
    model_size: ModelSize
    objective: Objective
    strategy: str
    model: str | None
    slots_per_gpu: SlotRequest
    memory: MemoryBudget
    max_moves: int | None
    top_k: int | None
    dispatch: Dispatch
    judge: Judge
    solver: SolverSettings


@dataclass(frozen=True)
class ComparedStrategy:
    """One row of ``compare``: its name, the strategy and what that optimises."""

    name: str
    strategy: str
    objective: Objective


@dataclass(frozen=True)
class CompareSettings:
    """Settings of ``compare``; ``workload`` holds the batch sizes to plan for and to judge on."""

    cluster: Cluster
    workload: Workload
    model_size: ModelSize
    strategies: tuple[str, ...]
    held_out: tuple[HeldOut, ...]
    pairs: Pairs
    max_load: float
    slots_per_gpu: SlotRequest
    memory: MemoryBudget
    dispatch: Dispatch
    judge: Judge
    solver: SolverSettings

    @property
    def left_out(self) -> tuple[str, ...]:
        """Strategies that were asked for and have no row on this cluster."""
        return tuple(name for name in self.strategies if name == "eplb_hierarchical" and self.cluster.nodes == 1)

    def rows(self) -> list[ComparedStrategy]:
        """Strategies to run, in order; the hierarchical one where there are several nodes (else it is EPLB)."""
        rows = []
        for name in self.strategies:
            strategy, objective = COMPARED[name]
            bound = self.max_load if name == "bounded_locality" else None
            shown = name if bound is None else f"locality ≤{bound:g}"
            if name not in self.left_out:
                rows.append(ComparedStrategy(shown, strategy, Objective(objective, self.pairs, bound)))
        return rows


def solve_settings(config: Mapping[str, Any]) -> SolveSettings:
    """Settings of ``solve`` from ``conf/solve.yaml``.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """
    workload, model_size = workload_settings(config["workload"])
    model = config["model"]
    if model is not None and (not isinstance(model, str) or not model):
        raise ProblemError(f"model {model!r}: expected a folder, a hub id, or null for the trace's model")
    return SolveSettings(
        cluster=Cluster.from_dict(settings_group(config, "cluster")),
        workload=workload,
        model_size=model_size,
        objective=build_settings(Objective, config["objective"], "objective"),
        strategy=str(settings_group(config, "strategy").get("name")),
        model=model,
        slots_per_gpu=config["slots_per_gpu"],
        memory=build_settings(MemoryBudget, config["memory"], "memory"),
        max_moves=config["max_moves"],
        top_k=config["top_k"],
        dispatch=build_settings(Dispatch, config["dispatch"], "dispatch"),
        judge=build_settings(Judge, config["judge"], "judge"),
        solver=build_settings(SolverSettings, config["solver"], "solver"),
    )


def compare_settings(config: Mapping[str, Any]) -> CompareSettings:
    """Settings of ``compare`` from ``conf/compare.yaml``.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """
    workload, model_size = workload_settings(config["workload"])
    if config["batch_sizes"] is not None:
        workload = replace(workload, batch_sizes=batch_sizes(config), shares=None)
    if config["max_load"] is None:
        raise ProblemError("max_load null: expected a number of at least 1 (1.0 is even)")
    Objective("locality", config["pairs"], config["max_load"])  # checks both
    return CompareSettings(
        cluster=Cluster.from_dict(settings_group(config, "cluster")),
        workload=workload,
        model_size=model_size,
        strategies=_names(config, "strategies", COMPARED),
        held_out=cast("tuple[HeldOut, ...]", _names(config, "held_out", get_args(HeldOut))),
        pairs=config["pairs"],
        max_load=config["max_load"],
        slots_per_gpu=config["slots_per_gpu"],
        memory=build_settings(MemoryBudget, config["memory"], "memory"),
        dispatch=build_settings(Dispatch, config["dispatch"], "dispatch"),
        judge=build_settings(Judge, config["judge"], "judge"),
        solver=build_settings(SolverSettings, config["solver"], "solver"),
    )


def _names(config: Mapping[str, Any], key: str, known: Collection[str]) -> tuple[str, ...]:
    """A list of names, each once."""
    names = config[key]
    if not isinstance(names, list) or not names or any(not isinstance(n, str) or n not in known for n in names):
        raise ProblemError(f"{key} {names!r}: expected a list of some of {list(known)}")
    return tuple(dict.fromkeys(names))


def judge_settings(config: Mapping[str, Any]) -> Judge:
    """The group ``judge`` of any configuration."""
    return build_settings(Judge, config["judge"], "judge")


def batch_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The list ``batch_sizes`` of a configuration; checked by ``Workload``."""
    sizes = config["batch_sizes"]
    if not isinstance(sizes, list):
        raise ProblemError(f"batch_sizes {sizes!r}: expected a list of integers above 0, for example [1,8,32]")
    return Workload(batch_sizes=tuple(sizes)).batch_sizes


def resolve_cluster(cluster: Cluster, model_size: ModelSize, expert_bytes: int | None) -> Cluster:
    """The cluster with the one set of coefficients that fits the model.

    Args:
        cluster: as described.
        model_size: sizes where nothing better is known.
        expert_bytes: as the trace tells it, or None.
    """
    size = model_size.expert_bytes if expert_bytes is None else expert_bytes
    return replace(cluster, coefficients=(cluster.coefficients_for(size, model_size.hidden_state_bytes),))


def evaluation_cluster(plan: PlacementPlan, config: Mapping[str, Any], expert_bytes: int | None) -> Cluster:
    """The cluster that ``evaluate`` judges a plan on: the configuration's where it names one, else the plan's own.

    Args:
        plan: what is judged.
        config: of ``conf/evaluate.yaml``.
        expert_bytes: as the trace tells it, or None; the plan's own figure comes first.

    Raises:
        ClusterError: neither names a cluster.
    """
    named = config.get("cluster")
    if named is None and not plan.cluster:
        raise ClusterError("the plan names no cluster: give one, for example cluster=h200x4")
    own = Cluster.from_dict(plan.cluster).coefficients if plan.cluster else ()
    size = ModelSize(config["expert_bytes"], config["hidden_state_bytes"])
    if own:
        size, expert_bytes = ModelSize(own[0].expert_bytes, own[0].hidden_state_bytes), None
    return resolve_cluster(Cluster.from_dict(plan.cluster if named is None else named), size, expert_bytes)


def workload_settings(group: object) -> tuple[Workload, ModelSize]:
    values = dict(_mapping(group, "workload"))
    size = ModelSize(values.pop("expert_bytes", None), values.pop("hidden_state_bytes", None))
    values["batch_sizes"] = batch_sizes(values | {"batch_sizes": values.get("batch_sizes")})
    if isinstance(values.get("shares"), list):
        values["shares"] = tuple(values["shares"])
    return build_settings(Workload, values, "workload"), size


def settings_group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(config[name], name)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ClusterError(f"{name} {value!r}: expected a preset of conf/{name}/ or a YAML file with its keys")
    return value


def build_settings(kind: Callable[..., T], group: object, name: str) -> T:
    """A dataclass from a group whose keys are its fields."""
    values = _mapping(group, name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ProblemError(f"{name} {dict(values)}: {error}; see conf/ for its keys") from None

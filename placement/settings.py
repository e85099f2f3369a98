"""Settings of the command line, from composed configuration to the dataclasses that everything below takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from placement.cluster import Cluster
from placement.errors import ClusterError, ProblemError
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, Pairs, SolverSettings
from placement.slots import is_int

T = TypeVar("T")


@dataclass(frozen=True)
class Judge:
    """How plans are judged: steps drawn per batch size, and the seed of the draw."""

    batches: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_int(self.batches) or self.batches < 1 or not is_int(self.seed) or self.seed < 0:
            raise ProblemError(
                f"judge.batches {self.batches!r}, judge.seed {self.seed!r}: expected integers of at least 1 and 0"
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
    slots_per_gpu: int | Sequence[int] | None
    dispatch: Dispatch
    judge: Judge
    solver: SolverSettings


@dataclass(frozen=True)
class CompareSettings:
    """Settings of ``compare``."""

    cluster: Cluster
    workload: Workload
    model_size: ModelSize
    pairs: Pairs
    max_load: float
    slots_per_gpu: int | Sequence[int] | None
    dispatch: Dispatch
    judge: Judge
    solver: SolverSettings


def solve_settings(config: Mapping[str, Any]) -> SolveSettings:
    """Settings of ``solve`` from ``conf/solve.yaml``.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """
    workload, model_size = _workload(config["workload"])
    model = config["model"]
    if model is not None and (not isinstance(model, str) or not model):
        raise ProblemError(f"model {model!r}: expected a folder, a hub id, or null for the trace's model")
    return SolveSettings(
        cluster=Cluster.from_dict(_group(config, "cluster")),
        workload=workload,
        model_size=model_size,
        objective=_build(Objective, config["objective"], "objective"),
        strategy=str(_group(config, "strategy").get("name")),
        model=model,
        slots_per_gpu=config["slots_per_gpu"],
        dispatch=_build(Dispatch, config["dispatch"], "dispatch"),
        judge=_build(Judge, config["judge"], "judge"),
        solver=_build(SolverSettings, config["solver"], "solver"),
    )


def compare_settings(config: Mapping[str, Any]) -> CompareSettings:
    """Settings of ``compare`` from ``conf/compare.yaml``.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """
    workload, model_size = _workload(config["workload"])
    if config["max_load"] is None:
        raise ProblemError("max_load null: expected a number of at least 1 (1.0 is even)")
    Objective("locality", config["pairs"], config["max_load"])  # checks both
    return CompareSettings(
        cluster=Cluster.from_dict(_group(config, "cluster")),
        workload=replace(workload, batch_sizes=batch_sizes(config)),
        model_size=model_size,
        pairs=config["pairs"],
        max_load=config["max_load"],
        slots_per_gpu=config["slots_per_gpu"],
        dispatch=_build(Dispatch, config["dispatch"], "dispatch"),
        judge=_build(Judge, config["judge"], "judge"),
        solver=_build(SolverSettings, config["solver"], "solver"),
    )


def judge_settings(config: Mapping[str, Any]) -> Judge:
    """The group ``judge`` of any configuration."""
    return _build(Judge, config["judge"], "judge")


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


def _workload(group: object) -> tuple[Workload, ModelSize]:
    values = dict(_mapping(group, "workload"))
    size = ModelSize(values.pop("expert_bytes", None), values.pop("hidden_state_bytes", None))
    values["batch_sizes"] = batch_sizes(values | {"batch_sizes": values.get("batch_sizes")})
    return _build(Workload, values, "workload"), size


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(config[name], name)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ClusterError(f"{name} {value!r}: expected a preset of conf/{name}/ or a YAML file with its keys")
    return value


def _build(kind: Callable[..., T], group: object, name: str) -> T:
    """A dataclass from a group whose keys are its fields."""
    values = _mapping(group, name)
    try:
        return kind(**values)
    except TypeError as error:
        raise ProblemError(f"{name} {dict(values)}: {error}; see conf/ for its keys") from None

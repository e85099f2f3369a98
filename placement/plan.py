"""The placement plan: which experts each GPU holds in every MoE layer, how steps choose among copies, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placement.atomic import write_atomically
from placement.errors import PlanError
from placement.slots import Slots, check_slots, copies_of_layer, is_int

FORMAT = "placement-plan"
VERSION = 1

Exchange = Literal["allreduce", "alltoall", "coherent"]
Phase = Literal["decode", "prefill", "mixed"]
DispatchRule = Literal["level", "nearest"]


@dataclass(frozen=True)
class Workload:
    """What is served: the phase, tokens per step, and how ranks exchange hidden states.

    Attributes:
        phase: of all steps, or ``mixed``.
        batch_sizes: tokens per step.
        exchange: how ranks exchange hidden states.
        shares: of the steps that have these batch sizes, in any unit; None for equal shares.
    """

    phase: Phase = "decode"
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    exchange: Exchange = "allreduce"
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise PlanError(f"workload phase {self.phase!r}: expected one of {list(get_args(Phase))}")
        if self.exchange not in get_args(Exchange):
            raise PlanError(f"exchange {self.exchange!r}: expected one of {list(get_args(Exchange))}")
        if not self.batch_sizes or not all(is_int(size) and size > 0 for size in self.batch_sizes):
            raise PlanError(f"batch_sizes {list(self.batch_sizes)}: expected at least one, all integers above 0")
        shares = self.shares
        if shares is not None and (
            not isinstance(shares, tuple) or len(shares) != len(self.batch_sizes) or not all(map(_is_share, shares))
        ):
            raise PlanError(f"workload shares {shares!r}: expected null or a number above 0 per batch size")

    def steps(self) -> list[tuple[int, float]]:
        """Batch sizes and their shares of all steps; the shares sum to 1."""
        shares = self.shares or (1.0,) * len(self.batch_sizes)
        return [(size, share / sum(shares)) for size, share in zip(self.batch_sizes, shares, strict=True)]


@dataclass(frozen=True)
class Dispatch:
    """The rule that chooses among copies; see ``placement.dispatch``."""

    rule: DispatchRule = "level"
    split_above_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(DispatchRule):
            raise PlanError(f"dispatch rule {self.rule!r}: expected one of {list(get_args(DispatchRule))}")
        limit = self.split_above_tokens
        if limit is not None and (not is_int(limit) or limit < 0):
            raise PlanError(f"split_above_tokens {limit!r}: expected null or an integer of at least 0")


@dataclass(frozen=True)
class PlacementPlan:
    """A placement of every expert of every MoE layer on GPUs (``plan.json``, format version 1).

    Attributes:
        model: hub id, or a path relative to the plan file.
        model_fingerprint: fingerprint of the model's configuration, or None when the trace had none.
        num_experts, top_k: of the model's MoE layers.
        layer_ids: decoder layers that are MoE, ascending.
        slots: ``slots[layer][gpu]``, logical expert ids; an expert on several GPUs has copies.
        cluster: the cluster description the plan was made for (see ``placement.cluster``); may be empty.
        predicted, solver, trace: what was predicted, how it was found, and from what; informative only.
        migration: copies to transfer from the plan that was running (see ``placement.migration``); may be empty.

    Raises:
        PlanError: any field contradicts another or is out of range.
    """

    model: str
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    slots: Slots
    model_fingerprint: str | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)
    workload: Workload = field(default_factory=Workload)
    dispatch: Dispatch = field(default_factory=Dispatch)
    strategy: str = "contiguous"
    objective: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    trace: Mapping[str, Any] = field(default_factory=dict)
    migration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("num_experts", self.num_experts), ("top_k", self.top_k)):
            if not is_int(value) or value < 1:
                raise PlanError(f"{name} {value!r}: expected an integer of at least 1")
        if self.top_k > self.num_experts:
            raise PlanError(f"top_k {self.top_k}: expected at most num_experts {self.num_experts}")
        ids = self.layer_ids
        if not ids or not all(is_int(i) and i >= 0 for i in ids) or list(ids) != sorted(set(ids)):
            raise PlanError(f"layer_ids {list(ids)}: expected ascending integers of at least 0, without repetition")
        check_slots(self.slots, self.num_experts, self.layer_ids)
        nodes, per_node = self.cluster.get("nodes"), self.cluster.get("gpus_per_node")
        if is_int(nodes) and is_int(per_node) and nodes * per_node != self.num_gpus:
            raise PlanError(
                f"slots lists {self.num_gpus} GPUs, the cluster has {nodes} nodes of {per_node}: solve again"
            )

    @property
    def num_gpus(self) -> int:
        """Number of GPUs, the same in every layer."""
        return len(self.slots[0])

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.slots)

    @property
    def has_copies(self) -> bool:
        """Whether any expert stands on more than one GPU."""
        return any(sum(map(len, layer)) > self.num_experts for layer in self.slots)

    def copies(self, layer_index: int) -> NDArray[np.int32]:
        """GPUs of each expert's copies in one layer: int32 [E, C], ascending, padded with -1."""
        return copies_of_layer(self.slots[layer_index], self.num_experts)

    @classmethod
    def load(cls, path: str | Path) -> PlacementPlan:
        """Read and validate ``plan.json``.

        Raises:
            PlanError: the file is missing, not JSON, of another format or version, or inconsistent.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read plan {path}: {error.strerror}; make one with `placement solve -o`") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan {path} is not JSON ({error}); make one with `placement solve -o`") from None
        try:
            return cls.from_dict(document)
        except PlanError as error:
            raise PlanError(f"plan {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write ``plan.json`` whole or not at all."""
        write_atomically(Path(path), _format_document(self.to_dict()))

    @classmethod
    def from_dict(cls, document: object) -> PlacementPlan:
        """Build a plan from parsed JSON; unknown keys are ignored.

        Raises:
            PlanError: a required key is missing, or a value has the wrong type or is out of range.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise PlanError(f"expected a JSON object with format {FORMAT!r}")
        if document.get("version") != VERSION:
            raise PlanError(f"version {document.get('version')!r}: this program reads version {VERSION}; solve again")
        workload = _section(document, "workload")
        dispatch = _section(document, "dispatch")
        sizes, shares = workload.get("batch_sizes", [1]), workload.get("shares")
        return cls(
            model=_text(document, "model"),
            model_fingerprint=_text(document, "model_fingerprint") if document.get("model_fingerprint") else None,
            num_experts=_required(document, "num_experts"),
            top_k=_required(document, "top_k"),
            layer_ids=tuple(_list(_required(document, "layer_ids"), "layer_ids")),
            slots=_slots_from_lists(_required(document, "slots")),
            cluster=_section(document, "cluster"),
            workload=Workload(
                phase=workload.get("phase", "decode"),
                batch_sizes=tuple(_list(sizes, "batch_sizes")),
                exchange=workload.get("exchange", "allreduce"),
                shares=None if shares is None else tuple(_list(shares, "shares")),
            ),
            dispatch=Dispatch(dispatch.get("rule", "level"), dispatch.get("split_above_tokens")),
            strategy=str(document.get("strategy", "")),
            objective=_section(document, "objective"),
            predicted=_section(document, "predicted"),
            solver=_section(document, "solver"),
            trace=_section(document, "trace"),
            migration=_section(document, "migration"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The document that ``save`` writes: plain dictionaries and lists, keys in the order of the format."""
        fields = asdict(self)
        order = ["model", "model_fingerprint", "num_experts", "top_k", "layer_ids", "cluster", "workload", "slots"]
        order += ["dispatch", "strategy", "objective", "predicted", "solver", "trace", "migration"]
        document = {"format": FORMAT, "version": VERSION} | {name: fields[name] for name in order}
        plain: dict[str, Any] = json.loads(json.dumps(document))
        return plain

    def resolve_model(self, plan_path: str | Path) -> str:
        """Path of the model where one lies relative to the plan file, else ``model`` itself (a hub id)."""
        local = Path(plan_path).parent / self.model
        return str(local) if local.exists() else self.model

    def check_model(
        self, num_experts: int, top_k: int, layer_ids: Sequence[int], fingerprint: str | None = None
    ) -> None:
        """Refuse a model (or trace) that this plan was not made for.

        Raises:
            PlanError: the expert count, top-k, MoE layers or fingerprint differ.
        """
        remedy = "use the model that was traced, or trace this one and solve again"
        for name, planned, actual in (
            ("experts per layer", self.num_experts, num_experts),
            ("experts per token (top_k)", self.top_k, top_k),
            ("MoE layers", list(self.layer_ids), list(layer_ids)),
        ):
            if planned != actual:
                raise PlanError(f"the plan is for {planned} {name}, the model has {actual}; {remedy}")
        if fingerprint and self.model_fingerprint and fingerprint != self.model_fingerprint:
            raise PlanError(
                f"the plan's model fingerprint {self.model_fingerprint[:12]}… differs from the model's "
                f"{fingerprint[:12]}…; {remedy}"
            )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _required(document: Mapping[str, Any], key: str) -> Any:
    if key not in document:
        raise PlanError(f"key {key!r} is missing")
    return document[key]


def _text(document: Mapping[str, Any], key: str) -> str:
    value = _required(document, key)
    if not isinstance(value, str):
        raise PlanError(f"{key} {value!r}: expected text")
    return value


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, Mapping):
        raise PlanError(f"{key} {value!r}: expected a JSON object")
    return value


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{name} {value!r}: expected a list")
    return value


def _slots_from_lists(slots: object) -> Slots:
    return tuple(
        tuple(tuple(_list(gpu, "slots of a GPU")) for gpu in _list(layer, "slots of a layer"))
        for layer in _list(slots, "slots")
    )


def _format_document(document: dict[str, Any]) -> str:
    """JSON with one line per key, and one line per layer of the slots, so that plans can be read and compared."""
    lines = []
    for key, value in document.items():
        if key == "slots":
            layers = ",\n".join(f"    {json.dumps(layer)}" for layer in value)
            lines.append(f'  "slots": [\n{layers}\n  ]')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

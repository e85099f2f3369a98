"""The cluster a plan is made for: GPUs, their memory and speed, the links between them, and step-time coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from placement.errors import ClusterError
from placement.slots import is_int

Source = Literal["measured", "assumed"]

#: Most nodes, and most GPUs of a node.
MOST_PER_LEVEL = 1024


@dataclass(frozen=True)
class Link:
    """One link class: latency in seconds, bandwidth in bytes per second and direction of one GPU's port."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_number("link latency_s", self.latency_s, minimum=0.0)
        _check_number("link bytes_per_s", self.bytes_per_s, minimum=1.0)


@dataclass(frozen=True)
class Coefficient:
    """A coefficient in microseconds, and whether it was measured or assumed (computed from bytes and FLOPs)."""

    value: float
    source: Source

    def __post_init__(self) -> None:
        _check_number("coefficient value", self.value, minimum=0.0)
        if self.source not in ("measured", "assumed"):
            raise ClusterError(f"coefficient source {self.source!r}: expected 'measured' or 'assumed'")


@dataclass(frozen=True)
class Coefficients:
    """Time of one MoE layer on one GPU, for experts of one size: c0·[any active] + c1·active + c2·pairs, in µs.

    Attributes:
        expert_bytes: bytes of one expert's weights in one layer.
        hidden_state_bytes: bytes of one token's hidden state, what an exchange moves per token.
        c0_us: fixed time of a layer with at least one active expert.
        c1_us: per active expert (reading its weights).
        c2_us: per token–expert pair (its arithmetic).
    """

    expert_bytes: int
    hidden_state_bytes: int
    c0_us: Coefficient
    c1_us: Coefficient
    c2_us: Coefficient

    def __post_init__(self) -> None:
        _check_number("expert_bytes", self.expert_bytes, minimum=1)
        _check_number("hidden_state_bytes", self.hidden_state_bytes, minimum=1)


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes (``cluster.yaml``).

    Attributes:
        name: for tables.
        nodes, gpus_per_node: topology; GPU g stands in node g // gpus_per_node.
        expert_memory_bytes: memory for routed experts, of every GPU or one number per GPU (uneven memory).
        hbm_bytes_per_s: memory bandwidth at which expert weights are read.
        flop_per_s: matrix FLOP/s in the experts' dtype.
        launch_us: assumed fixed time of one MoE layer's kernels, c0 where it is not measured.
        same_gpu, intra_node, inter_node: link classes; inter_node is unused with one node.
        coefficients: per size of expert, where measured (or resolved for a plan).
    """

    name: str
    nodes: int
    gpus_per_node: int
    expert_memory_bytes: tuple[float, ...]
    hbm_bytes_per_s: float
    flop_per_s: float
    launch_us: float
    same_gpu: Link
    intra_node: Link
    inter_node: Link
    coefficients: tuple[Coefficients, ...] = ()

    def __post_init__(self) -> None:
        _check_topology(self.nodes, self.gpus_per_node)
        for memory in self.expert_memory_bytes:
            _check_number("cluster expert_memory_bytes", memory, minimum=0.0)
        if len(self.expert_memory_bytes) != self.num_gpus:
            raise ClusterError(
                f"cluster expert_memory_bytes has {len(self.expert_memory_bytes)} numbers for {self.num_gpus} GPUs: "
                "give one number for all, or one per GPU"
            )
        _check_number("cluster hbm_bytes_per_s", self.hbm_bytes_per_s, minimum=1.0)
        _check_number("cluster flop_per_s", self.flop_per_s, minimum=1.0)
        _check_number("cluster launch_us", self.launch_us, minimum=0.0)

    @property
    def num_gpus(self) -> int:
        """GPUs in all nodes."""
        return self.nodes * self.gpus_per_node

    def coefficients_for(self, expert_bytes: int, hidden_state_bytes: int) -> Coefficients:
        """The coefficients for experts of this size: those listed, else computed from bytes and FLOPs.

        Two bytes per weight are assumed for the arithmetic (one multiplication and one addition per weight and pair).
        """
        for listed in self.coefficients:
            if listed.expert_bytes == expert_bytes and listed.hidden_state_bytes == hidden_state_bytes:
                return listed
        return Coefficients(
            expert_bytes=expert_bytes,
            hidden_state_bytes=hidden_state_bytes,
            c0_us=Coefficient(self.launch_us, "assumed"),
            c1_us=Coefficient(1e6 * expert_bytes / self.hbm_bytes_per_s, "assumed"),
            c2_us=Coefficient(1e6 * expert_bytes / self.flop_per_s, "assumed"),
        )

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Cluster:
        """Build a cluster from parsed YAML or JSON; unknown keys are ignored.

        Raises:
            ClusterError: a key is missing, or a value has the wrong type or is out of range.
        """
        try:
            nodes, gpus_per_node = document["nodes"], document["gpus_per_node"]
            memory = document["expert_memory_bytes"]
            if not isinstance(memory, list | tuple):
                _check_topology(nodes, gpus_per_node)
                memory = (memory,) * (nodes * gpus_per_node)
            return cls(
                name=str(document.get("name", "cluster")),
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                expert_memory_bytes=tuple(memory),
                hbm_bytes_per_s=document["hbm_bytes_per_s"],
                flop_per_s=document["flop_per_s"],
                launch_us=document["launch_us"],
                **{name: _link(document[name]) for name in ("same_gpu", "intra_node", "inter_node")},
                coefficients=tuple(_coefficients(entry) for entry in document.get("coefficients") or ()),
            )
        except KeyError as error:
            raise ClusterError(f"cluster key {error} is missing; see conf/cluster/ for complete examples") from None
        except TypeError as error:
            raise ClusterError(f"cluster is malformed ({error}); see conf/cluster/ for examples") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as ``from_dict`` reads them."""
        return asdict(self)


def _link(document: Mapping[str, Any]) -> Link:
    return Link(document["latency_s"], document["bytes_per_s"])


def _coefficients(document: Mapping[str, Any]) -> Coefficients:
    c0, c1, c2 = (
        Coefficient(document[name]["value"], document[name]["source"]) for name in ("c0_us", "c1_us", "c2_us")
    )
    return Coefficients(document["expert_bytes"], document["hidden_state_bytes"], c0, c1, c2)


def _check_topology(nodes: object, gpus_per_node: object) -> None:
    for label, number in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if not is_int(number) or not 1 <= number <= MOST_PER_LEVEL:
            raise ClusterError(f"cluster {label} {number!r}: expected an integer from 1 to {MOST_PER_LEVEL}")


def _check_number(name: str, value: object, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < minimum:
        raise ClusterError(f"{name} {value!r}: expected a finite number of at least {minimum:g}")

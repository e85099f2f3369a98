"""What all engines' files have in common: rows of physical slots, GPU after GPU, each with a logical expert id.

An engine numbers the slots of a layer 0 to P − 1 over all GPUs and gives every GPU the same number of them, so slot s
stands on GPU s // (P / G). Engines differ in which layers have a row and in how the rows are written.
Shape suffixes: G GPUs, P physical slots of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.errors import PlanError
from placement.plan import PlacementPlan
from placement.slots import Slots, check_slots, is_int

#: Logical expert ids of one layer's physical slots, [P].
Row = tuple[int, ...]

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class ModelLayers:
    """The facts about a model that an engine's file is read and written with.

    Attributes:
        num_experts: logical experts of a MoE layer.
        layer_ids: decoder layers that are MoE, ascending.
        num_layers: all decoder layers, dense ones included; None where unknown.

    Raises:
        PlanError: a MoE layer lies beyond the last decoder layer.
    """

    num_experts: int
    layer_ids: tuple[int, ...]
    num_layers: int | None = None

    def __post_init__(self) -> None:
        count = self.num_layers
        if count is not None and (not is_int(count) or count <= self.layer_ids[-1]):
            raise PlanError(
                f"num_layers {count!r}: expected an integer of at least {self.layer_ids[-1] + 1}, because layer "
                f"{self.layer_ids[-1]} is MoE; count all decoder layers of the model"
            )


@dataclass(frozen=True)
class EngineLayout:
    """A placement as an engine sees it.

    Attributes:
        model: the model's layers and experts.
        num_gpus: G.
        rows: one per MoE layer, [P] each; slot s stands on GPU s // (P / G).
    """

    model: ModelLayers
    num_gpus: int
    rows: tuple[Row, ...]

    @property
    def num_slots(self) -> int:
        """P, the same in every layer."""
        return len(self.rows[0])

    @property
    def num_redundant(self) -> int:
        """Slots of a layer beyond one per expert."""
        return self.num_slots - self.model.num_experts


@dataclass(frozen=True)
class Engine:
    """How placements are written for one engine, and read back.

    Attributes:
        title: for messages.
        suffixes: file names the engine takes; empty where it takes any.
        write: the file's content.
        read: the rows of the MoE layers, and the number of GPUs where the file tells it.
        start: what to start the engine with, given the layout and the file: lines to print.
    """

    title: str
    suffixes: tuple[str, ...]
    write: Callable[[EngineLayout], str]
    read: Callable[[Path, ModelLayers], tuple[tuple[Row, ...], int | None]]
    start: Callable[[EngineLayout, Path], list[str]]


def layout_of_plan(plan: PlacementPlan, engine: Engine, num_layers: int | None = None) -> EngineLayout:
    """A plan's slots in the numbering of engines, in the plan's order on every GPU.

    Args:
        plan: the placement.
        engine: for whom.
        num_layers: decoder layers of the model, or None where the engine needs no such number.

    Raises:
        PlanError: GPUs or layers differ in their number of slots, or ``num_layers`` is too small.
    """
    most = max(len(held) for layer in plan.slots for held in layer)
    for layer_id, layer in zip(plan.layer_ids, plan.slots, strict=True):
        for gpu, held in enumerate(layer):
            if len(held) < most:
                raise PlanError(
                    f"layer {layer_id}: GPU {gpu} holds {len(held)} experts where others hold {most}, and "
                    f"{engine.title} needs equally many on every GPU in every layer; solve again with "
                    f"slots_per_gpu={most} and a strategy that fills every slot with copies, such as strategy=eplb"
                )
    model = ModelLayers(plan.num_experts, plan.layer_ids, num_layers)
    rows = tuple(tuple(expert for held in layer for expert in held) for layer in plan.slots)
    return EngineLayout(model, plan.num_gpus, rows)


def slots_of_rows(rows: Sequence[Row], model: ModelLayers, num_gpus: int) -> Slots:
    """The slots of every GPU from an engine's rows, in the rows' order.

    Args:
        rows: one per MoE layer, [P] each.
        model: the model's layers and experts.
        num_gpus: G.

    Raises:
        PlanError: rows differ in length, do not divide among the GPUs, miss an expert or repeat one on a GPU.
    """
    num_slots = len(rows[0])
    for layer_id, row in zip(model.layer_ids, rows, strict=True):
        if len(row) != num_slots:
            raise PlanError(
                f"layer {layer_id} has {len(row)} slots, layer {model.layer_ids[0]} has {num_slots}: expected equally "
                "many in every layer"
            )
    if num_slots % num_gpus:
        raise PlanError(f"{num_slots} slots do not divide among {num_gpus} GPUs; give the number it was made for")
    per_gpu = num_slots // num_gpus
    slots = tuple(tuple(row[gpu * per_gpu : (gpu + 1) * per_gpu] for gpu in range(num_gpus)) for row in rows)
    check_slots(slots, model.num_experts, model.layer_ids)
    return slots


def vllm_ranks(layout: EngineLayout) -> str:
    """A line to print: vLLM has no flag for the number of expert-parallel ranks, two others multiply to it."""
    return f"with --tensor-parallel-size and --data-parallel-size so that their product is {layout.num_gpus}"


def check_row(row: object, where: str, num_experts: int) -> Row:
    """One row as a file has it, refused where it is no list of logical expert ids.

    Raises:
        PlanError: naming the slot and its value.
    """
    for slot, expert in enumerate(check_list(row, where)):
        if not is_int(expert) or not 0 <= expert < num_experts:
            padding = ", padding, which holds nothing" if is_int(expert) and expert == -1 else ""
            raise PlanError(
                f"{where}, slot {slot}: {shown(expert)}{padding}; expected an expert, 0 to {num_experts - 1}"
            )
    return tuple(check_list(row, where))


def check_list(value: object, where: str) -> list[Any]:
    """A list, or a refusal that says where one was expected."""
    if not isinstance(value, list):
        raise PlanError(f"{where}: {shown(value)}; expected a list")
    return value


def check_keys(value: object, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """An object with exactly the keys of a format; another engine's are refused.

    Raises:
        PlanError: naming the keys that are missing or not known.
    """
    if not isinstance(value, Mapping):
        raise PlanError(f"{where}: {shown(value)}; expected an object with {', '.join(required)}")
    missing = [key for key in required if key not in value]
    unknown = [key for key in value if key not in (*required, *optional)]
    if missing or unknown:
        problem = f"key {missing[0]!r} is missing" if missing else f"key {shown(unknown[0])} is not of this format"
        raise PlanError(f"{where}: {problem}; expected {', '.join(required)}, is it another engine's file?")
    return value


def check_count(value: object, where: str, expected: int) -> None:
    """Refuse a number in a file that contradicts what the file holds or the model has."""
    if not is_int(value) or value != expected:
        raise PlanError(f"{where} {shown(value)}: expected {expected}")


def check_slot_count(row: Row, where: str, num_slots: object) -> None:
    """Refuse a row that is not as long as the file's ``num_slots`` says."""
    if not is_int(num_slots) or num_slots != len(row):
        raise PlanError(f"{where} has {len(row)} slots, num_slots says {shown(num_slots)}: expected the same")


def check_layer_count(rows: Sized, model: ModelLayers, what: str) -> None:
    """Refuse a file whose number of MoE layers is not the model's."""
    if len(rows) != len(model.layer_ids):
        raise PlanError(f"{len(rows)} {what}, the model has {len(model.layer_ids)} MoE layers: expected one for each")


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        PlanError: it cannot be read, or is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not JSON ({error})") from None


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        PlanError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror}); name the engine's file") from None
    except UnicodeDecodeError:
        raise PlanError("not a text file; name the engine's file") from None


def shown(value: object) -> str:
    """A value for a message, on one line and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"

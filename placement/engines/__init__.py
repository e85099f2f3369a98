"""Placement files of serving engines: written from a plan, read back into slots."""

from __future__ import annotations

from pathlib import Path

from placement.engines import sglang, trtllm, vllm_41141, vllm_49572, vllm_ascend
from placement.engines.layout import Engine, EngineLayout, ModelLayers, layout_of_plan, read_json, shown, slots_of_rows
from placement.errors import PlanError
from placement.slots import Slots, is_int

#: Engines by the name that the command line gives them.
ENGINES: dict[str, Engine] = {
    "sglang": sglang.ENGINE,
    "vllm-49572": vllm_49572.ENGINE,
    "vllm-41141": vllm_41141.ENGINE,
    "vllm-ascend": vllm_ascend.ENGINE,
    "trtllm": trtllm.ENGINE,
}

__all__ = ["ENGINES", "EngineLayout", "ModelLayers", "configured_layers", "layout_of_plan", "read_slots"]


def read_slots(
    path: Path, name: str, model: ModelLayers, num_gpus: int | None = None, default_gpus: int | None = None
) -> Slots:
    """The placement that an engine's file holds.

    Args:
        path: the engine's file.
        name: of the engine, a key of ``ENGINES``.
        model: layers and experts of the model that the file is for.
        num_gpus: G, or None.
        default_gpus: G where neither ``num_gpus`` nor the file tells it.

    Returns:
        ``slots[layer][gpu]``, in the file's order on every GPU.

    Raises:
        PlanError: the file is not that engine's, does not fit the model, or is no valid placement.
    """
    engine = ENGINES[name]
    if num_gpus is not None and (not is_int(num_gpus) or num_gpus < 1):
        raise PlanError(f"gpus {num_gpus!r}: expected an integer of at least 1")
    try:
        rows, told = engine.read(path, model)
        if told is not None and num_gpus not in (None, told):
            raise PlanError(f"lists {told} GPUs, gpus={num_gpus} was given; leave gpus away")
        gpus = told or num_gpus or default_gpus
        if gpus is None:
            raise PlanError(f"{engine.title}'s files do not tell the number of GPUs; add gpus=N")
        return slots_of_rows(rows, model, gpus)
    except PlanError as error:
        raise PlanError(f"{name} file {path}: {error}") from None


def configured_layers(model: str) -> int | None:
    """Decoder layers by a local model's ``config.json``; None where there is no such file or it does not say.

    Args:
        model: folder of the model; anything else, such as a hub id, is not looked up.

    Raises:
        PlanError: the file is there and cannot be read.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except PlanError as error:
        raise PlanError(f"{path}: {error}; copy the model again, or give num_layers=N") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path}: {shown(config)}; expected an object, or give num_layers=N")
    text = config.get("text_config")  # of models that read more than text
    for section in (config, text):
        if isinstance(section, dict) and is_int(section.get("num_hidden_layers")):
            return int(section["num_hidden_layers"])
    return None

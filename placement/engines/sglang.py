"""SGLang: ``--init-expert-location``, one row of physical slots for every decoder layer.

Source: https://github.com/sgl-project/sglang, python/sglang/srt/eplb/expert_location.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from placement.engines.layout import (
    Engine,
    EngineLayout,
    ModelLayers,
    Row,
    check_keys,
    check_list,
    check_row,
    read_json,
    shown,
)
from placement.errors import PlanError

_KEY = "physical_to_logical_map"


def _write(layout: EngineLayout) -> str:
    """Rows of all decoder layers under the one key: SGLang passes the object on as keyword arguments.

    A dense layer never looks at its row, but SGLang inverts every row, and its static dispatch draws a copy of every
    expert in each: so the row must hold all experts. It gets SGLang's own start layout, slot s with expert s mod E.
    """
    model = layout.model
    assert model.num_layers is not None
    dense = tuple(slot % model.num_experts for slot in range(layout.num_slots))
    placed = dict(zip(model.layer_ids, layout.rows, strict=True))
    rows = [json.dumps(placed.get(layer, dense)) for layer in range(model.num_layers)]
    return f'{{"{_KEY}": [\n' + ",\n".join(rows) + "\n]}\n"


def _read(path: Path, model: ModelLayers) -> tuple[tuple[Row, ...], int | None]:
    document = _read_tensors(path) if path.suffix == ".pt" else read_json(path)
    if isinstance(document, dict) and "logical_count" in document:
        raise PlanError(
            "logical_count holds counts, from which SGLang places experts when it starts: no placement to import; "
            f"export one with {_KEY}"
        )
    rows = check_list(check_keys(document, "file", [_KEY])[_KEY], _KEY)
    least = model.layer_ids[-1] + 1
    if len(rows) < least or len(rows) != (model.num_layers or len(rows)):
        expected = f"at least {least}" if model.num_layers is None else str(model.num_layers)
        raise PlanError(f"{_KEY} has {len(rows)} rows: expected {expected}, one per decoder layer, dense ones included")
    checked = [check_row(row, f"layer {layer}", model.num_experts) for layer, row in enumerate(rows)]
    uneven = [layer for layer, row in enumerate(checked) if len(row) != len(checked[0])]
    if uneven:
        raise PlanError(
            f"layer {uneven[0]} has {len(checked[uneven[0]])} slots, layer 0 has {len(checked[0])}: expected equally "
            "many in every layer"
        )
    return tuple(checked[layer] for layer in model.layer_ids), None


def _read_tensors(path: Path) -> Any:
    """A ``.pt`` file with its tensors as lists; only tensors and plain containers are loaded, never code."""
    import pickle

    try:
        import torch
    except ImportError:
        raise PlanError("a .pt file needs PyTorch to be read; install torch, or give the .json form") from None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PlanError(f"cannot be read ({error.strerror}); name SGLang's file") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError) as error:
        raise PlanError(f"no .pt file with tensors alone ({type(error).__name__}); give the .json form") from None
    if not isinstance(document, dict):
        raise PlanError(f"{shown(document)}; expected an object with {_KEY}")
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in document.items()}


def _start(layout: EngineLayout, path: Path) -> list[str]:
    return [
        f"--tp-size {layout.num_gpus} --ep-size {layout.num_gpus} --init-expert-location {shlex.quote(str(path))} "
        f"--ep-num-redundant-experts {layout.num_redundant}",
        "leave --enable-eplb off: it would move the experts again",
    ]


ENGINE = Engine("SGLang", (".json",), _write, _read, _start)

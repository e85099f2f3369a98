"""TensorRT-LLM: a directory of expert statistics, ``meta_info.json`` and one ``rank*.safetensors`` per rank.

Read in TensorRT-LLM's source: tensors are named ``"{iteration}_{layer}"``, layer the decoder layer, with the counts of
logical experts ``[E]`` (``bincount``, int64; its documentation has int32); its own tool adds the ranks. A later variant
adds ``rank*_raw.safetensors`` with the chosen ids ``[tokens, K]`` of an iteration under the same names. These tell
neither which tokens are of one request nor prefill from decode, and an iteration run in parts keeps the last part
alone: they make no trace.

Inferred: without attention data parallelism all ranks see the same tokens and write equal files; those count once.

Source: https://github.com/NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/modules/fused_moe/expert_statistic.py and
examples/wide_ep/ep_load_balancer/utils.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.importers.checks import require_counts, require_mapping, require_recorded, shown
from profiler.importers.recording import ModelFacts, RecordedCounts, RecordingError, Remarks
from profiler.trace_header import MOST_EXPERTS, map_tensor, read_header

_RAW = "_raw.safetensors"
_REASON = "raw ids tell neither requests nor prefill from decode, so they make no trace"


def read(paths: Sequence[Path], facts: ModelFacts, remarks: Remarks) -> RecordedCounts:
    """Counts of all directories and ranks together.

    Raises:
        RecordingError: a file is missing, damaged, or of another model.
    """
    total: dict[int, np.ndarray] = {}
    for folder in paths:
        if folder.name.endswith(_RAW):
            raise RecordingError(f"{folder}: {_REASON}; give the directory, for its counts")
        if not folder.is_dir():
            raise RecordingError(f"{folder}: no directory; give the one named by EXPERT_STATISTIC_PATH")
        num_experts = _meta_info(folder, facts)
        facts = replace(facts, num_experts=num_experts)  # of all directories
        _add_ranks(folder, num_experts, total, remarks)
    where = str(paths[0])
    beyond = [layer for layer in total if facts.layer_ids is not None and layer not in facts.layer_ids]
    draft = [layer for layer in beyond if facts.layer_ids is not None and layer > facts.layer_ids[-1]]
    if len(draft) < len(beyond):
        raise RecordingError(
            f"{where}: counts of layer {min(beyond)}, which is not MoE in {facts.model}: a recording of another model; "
            "name its own model"
        )
    remarks.count("layers beyond the model's last (a draft's) left out", len(draft))
    layer_ids = facts.layer_ids or tuple(sorted(total))
    zeros = np.zeros(num_experts, np.int64)
    counts = np.stack([total.get(layer, zeros) for layer in layer_ids])
    require_recorded(counts.max(axis=1) > 0, layer_ids, where)
    return RecordedCounts(layer_ids, counts)


def _meta_info(folder: Path, facts: ModelFacts) -> int:
    """The number of experts; that of experts per token is checked alone, as counts do not keep it."""
    path = folder / "meta_info.json"
    try:
        found = require_mapping(json.loads(path.read_bytes()), str(path), "an object with num_experts")
    except OSError as error:
        raise RecordingError(
            f"{path}: cannot be read ({error.strerror}); give the directory with rank 0's files"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"{path}: not JSON; record it again") from error
    for name in ("num_experts", "num_experts_per_token"):
        value = found.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_EXPERTS:
            raise RecordingError(f"{path}: {name} is {shown(value)}, expected a number of experts; record it again")
    facts.agree("top_k", found["num_experts_per_token"], str(path))
    return facts.agree("num_experts", found["num_experts"], str(path))


def _add_ranks(folder: Path, num_experts: int, total: dict[int, np.ndarray], remarks: Remarks) -> None:
    """Add the counts ``[E]`` of every rank to those of its layers."""
    files = sorted(path for path in folder.glob("rank*.safetensors") if not path.name.endswith(_RAW))
    raw = list(folder.glob(f"rank*{_RAW}"))
    if not files:
        reason = f"; {_REASON}" if raw else ""
        raise RecordingError(f"{folder}: holds no rank*.safetensors with counts{reason}; record it again")
    if raw:
        remarks.say(f"rank*{_RAW} left out: {_REASON}")
    seen: set[bytes] = set()
    for path in files:
        counts = _rank_counts(path, num_experts)
        digest = hashlib.sha256(
            b"".join(name.encode() + row.tobytes() for name, row in sorted(counts.items()))
        ).digest()
        if digest in seen:
            remarks.count("files left out, equal to another rank's")
            continue
        seen.add(digest)
        for name, row in counts.items():
            layer = int(name.split("_")[1])
            total[layer] = total.get(layer, 0) + row


def _rank_counts(path: Path, num_experts: int) -> dict[str, np.ndarray]:
    """int64 ``[E]`` by ``"{iteration}_{layer}"`` of one file."""
    try:
        _, entries = read_header(path)
    except TraceError as error:
        raise RecordingError(f"{error}, or give TensorRT-LLM's own statistics") from error
    counts = {}
    for name, entry in entries.items():
        if re.fullmatch(r"\d{1,12}_\d{1,6}", name, re.ASCII) is None:
            raise RecordingError(f"{path}: tensor {shown(name)}, expected names such as 100_3, iteration and layer")
        if entry.dtype_name not in ("I32", "I64") or entry.shape != (num_experts,):
            raise RecordingError(
                f"{path}: tensor {name} is {entry.dtype_name} {list(entry.shape)}, expected I32 or I64 "
                f"[{num_experts}]; record it again"
            )
        counts[name] = np.array(map_tensor(path, entry), np.int64)
        require_counts(counts[name], f"{path}: tensor {name}")
    if not counts:
        raise RecordingError(f"{path}: holds no counts; record while requests are served")
    return counts

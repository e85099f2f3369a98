"""Recordings as serving engines write them, byte by byte as their sources and documentation have it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

EXTEND, DECODE, MIXED, IDLE, TARGET_VERIFY = 1, 2, 3, 4, 5  # of SGLang's ForwardMode
RECORDED_CHOICES = 8  # SGLang's recorder has room for so many, whatever the model's K


def random_routes(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """Distinct logical experts ``[T, L, K]``."""
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return np.argsort(scores, axis=-1)[..., :top_k]


def in_all_layers(routes_TLK: np.ndarray, layer_ids: Sequence[int], num_layers: int, fill: int) -> np.ndarray:
    """Rows of all decoder layers ``[T, R, K]``; dense ones hold ``fill``."""
    rows = np.full((len(routes_TLK), num_layers, routes_TLK.shape[2]), fill)
    rows[:, list(layer_ids)] = routes_TLK
    return rows


def count_routes(routes_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Pairs per layer and expert, int64 ``[L, E]``."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in routes_TLK.transpose(1, 0, 2)])


def slot_map(num_layers: int, num_experts: int, num_copies: int, seed: int = 0) -> np.ndarray:
    """A shuffled map of slots ``[R, E + copies]`` in which every expert has one slot at least."""
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation(np.r_[np.arange(num_experts), generator.integers(0, num_experts, num_copies)])
        for _ in range(num_layers)
    ]
    return np.array(rows)


def to_slots(routes_TLK: np.ndarray, map_RP: np.ndarray, layer_ids: Sequence[int], seed: int = 0) -> np.ndarray:
    """A random copy of every chosen expert, slots ``[T, L, K]``."""
    generator = np.random.default_rng(seed)
    slots = np.empty_like(routes_TLK)
    for index in np.ndindex(routes_TLK.shape):
        slots[index] = generator.choice(np.flatnonzero(map_RP[layer_ids[index[1]]] == routes_TLK[index]))
    return slots


def write_stat(path: Path, logical_count: np.ndarray) -> Path:
    """SGLang ``stat``: ``[steps, R, E]``, summed over ranks, by rank 0 alone."""
    document = {
        "rank": 0,
        "logical_count": torch.tensor(logical_count, dtype=torch.int32),
        "average_utilization_rate_over_window": None,
    }
    torch.save(document, path)
    return path


def write_passes(path: Path, physical_counts: np.ndarray, map_RP: np.ndarray, rank: int = 0, start: int = 0) -> Path:
    """SGLang ``per_pass``: ``[passes, R, P]``."""
    records = [
        {
            "forward_pass_id": start + index,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(counts, dtype=torch.int32),
        }
        for index, counts in enumerate(physical_counts)
    ]
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(map_RP)}, path)
    return path


def token_record(
    number: int,
    mode: int,
    token_ids: Sequence[int],
    positions: Sequence[int],
    slots_TLK: np.ndarray,
    layer_ids: Sequence[int],
    num_slots: Sequence[int],
    lengths: Sequence[int] | None = None,
    rank: int = 0,
) -> dict[str, Any]:
    """One record of SGLang ``per_token``; ``num_slots`` is the shape ``[R, P]`` of the map."""
    num_layers, slots = num_slots
    num_tokens = len(token_ids)
    ids = np.full((num_layers, num_tokens, RECORDED_CHOICES), -1, np.int32)
    ids[list(layer_ids), : len(slots_TLK), : slots_TLK.shape[2]] = slots_TLK.transpose(1, 0, 2)
    counts = np.stack([np.bincount(row[row >= 0], minlength=slots) for row in ids.reshape(num_layers, -1)])
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(token_ids),
        "positions": list(positions),
        "extend_seq_lens": None if lengths is None else list(lengths),
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(ids),
        "misc_objects": [],
        "global_physical_count": torch.tensor(counts, dtype=torch.int32),
    }


def write_tokens(path: Path, records: Sequence[Mapping[str, Any]], map_RP: np.ndarray) -> Path:
    """SGLang ``per_token``."""
    torch.save({"records": list(records), "last_physical_to_logical_map": torch.tensor(map_RP)}, path)
    return path


def sglang_text(rows_TRK: np.ndarray) -> str:
    """SGLang's ``routed_experts`` over HTTP."""
    return base64.b64encode(np.ascontiguousarray(rows_TRK, "<i4").tobytes()).decode()


def npy_text(rows_TRK: np.ndarray, dtype: str = "u1") -> str:
    """vLLM's ``routed_experts`` over HTTP, since it sends text."""
    buffer = io.BytesIO()
    np.save(buffer, rows_TRK.astype(dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def write_lines(path: Path, values: Sequence[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_statistics(
    folder: Path, counts_by_rank: Sequence[Mapping[str, np.ndarray]], num_experts: int, top_k: int, dtype: str = "<i4"
) -> Path:
    """TensorRT-LLM's directory of expert statistics."""
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": num_experts, "num_experts_per_token": top_k}))
    for rank, counts in enumerate(counts_by_rank):
        save_file({name: row.astype(dtype) for name, row in counts.items()}, folder / f"rank{rank}.safetensors")
    return folder

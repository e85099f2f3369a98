"""ExFlow: a ``.npy`` file of the expert of every token in every MoE layer, int ``[T, L]``, top-1.

The file names neither requests nor phases. All its tokens count as prefill, and as one sequence unless
they are to be cut into runs of equal length, so that a plan can be solved on some and judged on others.

Source: Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference (Yao et al., 2024),
and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from profiler.importers.checks import NPY_ERRORS, check_routes, moe_rows
from profiler.importers.recording import (
    ModelFacts,
    RecordedRoutes,
    RecordedSequence,
    RecordingError,
    Remarks,
    routes_of,
)


def read(
    paths: Sequence[Path], facts: ModelFacts, remarks: Remarks, tokens_per_sequence: int | None = None
) -> RecordedRoutes:
    """Tokens of all files; a sequence never goes on in the next file.

    Args:
        paths: ``.npy`` files.
        facts: the model: its experts and MoE layers are not in the file.
        remarks: what was taken for granted.
        tokens_per_sequence: cut runs of so many tokens; None for one sequence per file.

    Raises:
        RecordingError: a file is a placement, damaged, or of another model.
    """
    if facts.num_experts is None or facts.layer_ids is None:
        raise RecordingError(f"{paths[0]}: names neither experts nor layers; add --like, or --num-experts and --layers")
    facts.agree("top_k", 1, str(paths[0]))
    num_experts, layer_ids = facts.num_experts, facts.layer_ids
    remarks.say("phases are not told in the recording: all tokens count as prefill")
    if tokens_per_sequence is None:
        remarks.say("requests are not told either: each file is one sequence (see --tokens-per-sequence)")

    def sequences() -> Iterator[RecordedSequence]:
        for path in paths:
            tokens = _load(path)
            rows, _ = moe_rows(tokens.shape[1], "MoE layers", None, facts, str(path))
            experts = tokens[:, rows, None]
            for start in range(0, len(experts), tokens_per_sequence or len(experts)):
                part = experts[start : start + (tokens_per_sequence or len(experts))]
                check_routes(part, num_experts, layer_ids, str(path))
                yield RecordedSequence(part, np.arange(len(part)), np.zeros(len(part), bool))

    return routes_of(sequences(), num_experts, layer_ids, str(paths[0]))


def _load(path: Path) -> np.ndarray:
    """Integer ``[T, L]``, mapped; never a pickle."""
    if path.suffix == ".csv":
        raise RecordingError(
            f"{path}: a placement (Expert,Node), no recording; give the .npy file of the tokens' experts"
        )
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror}); give ExFlow's .npy file") from error
    except NPY_ERRORS as error:
        raise RecordingError(f"{path}: not a .npy file of numbers, or cut short; record it again") from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise RecordingError(
            f"{path}: {tokens.dtype} of shape {list(tokens.shape)}, expected integers [tokens, layers]; record it again"
        )
    return tokens

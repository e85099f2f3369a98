"""What the public gpt-oss-20b trace says of the papers' claims, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from profiler.predictors.scoring import score_predictors
from profiler.trace_format import RoutingTrace

REPOSITORY = Path(__file__).resolve().parents[3]
TRACE = Path(os.environ.get("EXPERTPLAN_TRACES", REPOSITORY.parent / "shared" / "traces")) / "gpt-oss-20b.safetensors"

pytestmark = pytest.mark.skipif(not TRACE.is_file(), reason="no gpt-oss-20b trace; EXPERTPLAN_TRACES names its folder")


def test_longer_paths_tell_more_until_they_are_rare() -> None:
    with RoutingTrace.open(TRACE, validate=False) as trace:
        scores = {score.predictor: score for score in score_predictors(trace, num_batches=200)}
    assert "token-id" not in scores
    assert {(score.learned_tokens, score.judged_tokens) for score in scores.values()} == {(31_107, 33_448)}
    hits = {name: score.hit_rate[-23:].mean() for name, score in scores.items()}
    assert hits["popularity"] == pytest.approx(0.288, abs=0.001)
    assert hits["affinity"] == pytest.approx(0.591, abs=0.001)
    expected = [0.562, 0.631, 0.651, 0.658, 0.659, 0.659]
    assert [hits[f"path-{length}"] for length in range(1, 7)] == pytest.approx(expected, abs=0.001)
    assert scores["path-6"].backed_off.mean() == pytest.approx(0.340, abs=0.001)
    assert scores["path-3"].replan_rate.mean() == pytest.approx(0.86, abs=0.02)

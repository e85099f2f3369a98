"""The public gpt-oss-20b trace, where it is at hand: opens, validates, and shows the affinity that is known of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from profiler.profile_builder import profile_trace
from profiler.statistics import collect_statistics, mutual_information, shuffled_affinity
from profiler.trace_format import RoutingTrace

REPOSITORY = Path(__file__).resolve().parents[2]
TRACE = Path(os.environ.get("EXPERTPLAN_TRACES", REPOSITORY.parent / "shared" / "traces")) / "gpt-oss-20b.safetensors"

pytestmark = pytest.mark.skipif(not TRACE.is_file(), reason="no gpt-oss-20b trace; EXPERTPLAN_TRACES names its folder")


def test_it_opens_and_validates() -> None:
    with RoutingTrace.open(TRACE) as trace:
        assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (64_555, 24, 32, 4)
        assert trace.num_sequences == 198 == len(trace.domains or ())
        assert trace.has_weights
        assert not trace.has_token_ids
        assert (trace.model_fingerprint, trace.expert_bytes) == (None, None)
        assert trace.split_mask("even").sum() + trace.split_mask("odd").sum() == trace.num_tokens


def test_its_layers_inform_one_another() -> None:
    with RoutingTrace.open(TRACE) as trace:
        statistics = collect_statistics(trace)
        shuffled, _ = shuffled_affinity(trace)
    assert (statistics.popularity.sum(axis=1) == trace.num_tokens * 4).all()
    np.testing.assert_array_equal(np.diagonal(statistics.coactivation, axis1=1, axis2=2), statistics.popularity)
    assert np.mean([mutual_information(counts) for counts in statistics.affinity]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([mutual_information(counts) for counts in statistics.top1_affinity]) == pytest.approx(1.5, abs=0.05)
    assert np.mean([mutual_information(counts) for counts in shuffled]) < 0.001


def test_its_profile_is_that_of_the_documentation() -> None:
    with RoutingTrace.open(TRACE) as trace:
        profile = profile_trace(trace)
    by_gpus = {potential.num_gpus: potential for potential in profile.potentials}
    assert by_gpus[4].kept == pytest.approx(0.556, abs=0.002)
    assert by_gpus[4].contiguous == pytest.approx(0.247, abs=0.001)
    assert profile.convergence is not None
    assert profile.convergence.stable_at == 4000
    assert profile.active is not None
    assert profile.active.phase == "decode"
    assert profile.active.mixed[profile.active.batch_sizes.index(8)].mean() == pytest.approx(17.7, abs=0.05)
    assert profile.time_drift is not None
    assert profile.time_drift.to_all.mean() > profile.time_drift.to_all_control.mean()

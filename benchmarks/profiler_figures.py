"""The figures of docs/profiling.md: profiles of the public trace and of the bundled model, and the document's tables.

    python -m benchmarks.profiler_figures [--document]

The public trace is gpt-oss-20b.safetensors in the folder that EXPERTPLAN_TRACES names (default ../shared/traces); the
bundled model is traced anew. ``--document`` only fills the tables from the files of results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

from benchmarks.marked_tables import Row, Tables, fill, markdown_table, only
from benchmarks.profiler_predictability import demo_trace, public_trace
from placement.atomic import write_atomically
from placement.provenance import CHECKOUT, describe_run
from profiler.measures import entropy_bits, gini, popularity_skew
from profiler.profile import Drift, RoutingProfile
from profiler.profile_builder import profile_trace

DOCUMENT = CHECKOUT / "docs" / "profiling.md"
RESULTS = CHECKOUT / "benchmarks" / "results"
TRACES = ("gpt-oss-20b", "demo-moe")
BATCHES = (1, 8, 32, 128)


def figures(profile: RoutingProfile) -> dict[str, float | None]:
    """One number per figure of a profile; None where the trace cannot tell."""
    found: dict[str, float | None] = {"tokens": profile.source.num_tokens, "sequences": profile.source.num_sequences}
    skew_L = popularity_skew(profile.popularity)
    found |= {
        "busiest expert / mean, mean of layers": skew_L.mean(),
        "busiest expert / mean, worst layer": skew_L.max(),
        "Gini coefficient, mean of layers": gini(profile.popularity).mean(),
        "entropy of a layer's choices in bits, mean": entropy_bits(profile.popularity).mean(),
        "the most there could be, log2 of the experts": np.log2(profile.source.num_experts),
    }
    if (bits := profile.information) is not None:
        found |= {
            "mutual information of adjacent layers in bits, all pairs": bits.pairs.mean(),
            "the same, shuffled": bits.pairs_shuffled.mean(),
            "mutual information in bits, first choices": bits.top1.mean(),
            "first choices, shuffled": bits.top1_shuffled.mean(),
        }
    if (active := profile.active) is not None:
        for batch in BATCHES:
            row = active.batch_sizes.index(batch)
            found[f"active experts of a layer, {batch} tokens"] = active.mixed[row].mean()
            found[f"the same if uniform, {batch} tokens"] = active.uniform[row]
    if (convergence := profile.convergence) is not None:
        found["tokens until affinity is stable"] = convergence.stable_at
        found["distance that remains"] = convergence.floor
    for name, drift in (("domain", profile.domain_drift), ("window of time", profile.time_drift)):
        found[f"choices moved, mean {name}"] = _mean(drift, lambda drift: drift.to_all)
        found[f"choices moved by chance, mean {name}"] = _mean(drift, lambda drift: drift.to_all_control)
    for potential in profile.potentials:
        found[f"pairs kept on one of {potential.num_gpus} GPUs"] = potential.kept
        found[f"pairs kept on one of {potential.num_gpus} GPUs, contiguous"] = potential.contiguous
        found[f"busiest of {potential.num_gpus} GPUs / mean, worst layer"] = potential.max_load
    return found


def _mean(drift: Drift | None, pick: Callable[[Drift], np.ndarray]) -> float | None:
    return None if drift is None else pick(drift).mean()


def measure() -> None:
    """Profile both traces and write the file of results."""
    rows: list[Row] = []
    for name, open_trace in zip(TRACES, (public_trace, demo_trace), strict=True):
        with open_trace() as trace:
            for figure, value in figures(profile_trace(trace)).items():
                rows.append(
                    {"trace": name, "figure": figure, "value": None if value is None else round(float(value), 5)}
                )
    document = describe_run(("numpy", "numba", "scipy")) | {"rows": rows}
    write_atomically(RESULTS / "profiler_profiles.json", json.dumps(document, indent=1) + "\n")


def _profiles(rows: list[Row]) -> str:
    by_trace = {name: {row["figure"]: row["value"] for row in only(rows, trace=name)} for name in TRACES}
    names = dict.fromkeys(row["figure"] for row in rows)
    return markdown_table(
        ["figure", *TRACES], ([name, *(_shown(by_trace[trace].get(name)) for trace in TRACES)] for name in names)
    )


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def _predictability(rows: list[Row]) -> str:
    lines = []
    for trace in TRACES:
        for row in only(rows, trace=trace, batch=32, layer="mean"):
            if row["choices"] > 1:
                names = ("hit_rate", "top1_hit_rate", "backed_off", "batch_accuracy", "replan_rate")
                lines.append([trace, row["predictor"], *(f"{row[name]:.1%}" for name in names)])
    head = ["trace", "predictor", "experts", "first choice", "unseen context", "popular experts", "re-plans"]
    return markdown_table(head, lines)


def _statistics(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        figures = [f"{row['trace_gib']:.2f}", row["output"], f"{row['seconds']:.0f}", f"{row['peak_rss_gib']:.2f}"]
        lines.append([f"{row['tokens']:,}", *figures])
    return markdown_table(["tokens", "trace, GiB", "output", "seconds", "peak memory, GiB"], lines)


def _recording(rows: list[Row]) -> str:
    lines = [
        [
            row["recording"],
            f"{row['s_per_generate']:.2f} ({row['min_s_per_generate']:.2f}–{row['max_s_per_generate']:.2f})",
            "" if row["recording"] == "none" else f"{row['slowdown_fraction']:+.1%}",
            f"{row['peak_memory_gb']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["recorded", "seconds per generate (least–most)", "slower by", "GPU memory, GB"], lines)


TABLES: Tables = {
    "profiles": ("profiler_profiles", _profiles),
    "predictability": ("profiler_predictability", _predictability),
    "statistics": ("profiler_statistics", _statistics),
    "recording": ("profiler_recording", _recording),
}


def main() -> None:
    """Measure, unless only the document is asked for, and fill its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help="only fill the tables of docs/profiling.md")
    if not parser.parse_args().document:
        measure()
    write_atomically(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8"), RESULTS, TABLES))


if __name__ == "__main__":
    main()

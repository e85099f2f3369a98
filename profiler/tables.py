"""The short tables that ``stats`` prints about a trace or a file of counts."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from profiler.measures import entropy_bits, gini, popularity_skew, total_variation
from profiler.profile import ActiveExperts, Information, RoutingProfile


def layer_table(profile: RoutingProfile) -> Table:
    """Per layer: how uneven the experts are, and what a layer's choices tell about the next layer's."""
    information = profile.information
    table = Table(title="per layer", pad_edge=False)  # or 80 columns would be too few
    columns = ["layer", "busiest / mean", "Gini", "never chosen", "bits of entropy"]
    if information is not None:
        columns += ["bits", "chance", "top-1 bits", "chance"]
        table.caption = "bits: mutual information of the experts chosen here and in the next layer"
    for column in columns:
        table.add_column(column, justify="right")
    skew_L, gini_L = popularity_skew(profile.popularity), gini(profile.popularity)
    entropy_L, never_L = entropy_bits(profile.popularity), (profile.popularity == 0).sum(axis=1)
    for layer, layer_id in enumerate(profile.source.layer_ids):
        uneven = [f"{skew_L[layer]:.2f}", f"{gini_L[layer]:.2f}", f"{entropy_L[layer]:.2f}"]
        skew, evenness, entropy = uneven if profile.popularity[layer].any() else ["-"] * 3
        cells = [skew, evenness, str(never_L[layer]), entropy]
        if information is not None:
            last = layer + 1 == len(profile.popularity)
            cells += [""] * 4 if last else [f"{bits_L[layer]:.4f}" for bits_L in _columns(information)]
        table.add_row(str(layer_id), *cells)
    return table


def group_table(profile: RoutingProfile) -> Table:
    """Per phase and domain: how uneven its experts are, and how far its popularity is from the whole trace's."""
    table = Table(
        title="per phase and domain",
        caption="moved: share of its choices that would have to change to match the trace; chance: the same for as "
        "many sequences chosen at random",
    )
    for column in ("tokens of", "tokens", "busiest / mean", "Gini", "moved", "chance"):
        table.add_column(column, justify="left" if column == "tokens of" else "right", overflow="fold")
    drift = profile.domain_drift
    chance = {} if drift is None else dict(zip(drift.names, drift.to_all_control, strict=True))
    groups = [
        *((name, profile.tokens_by_phase[name], counts, None) for name, counts in profile.popularity_by_phase.items()),
        *(
            (name, profile.tokens_by_domain[name], counts, chance.get(name))
            for name, counts in profile.popularity_by_domain.items()
        ),
    ]
    for name, tokens, popularity_LE, by_chance in groups:
        moved = total_variation(popularity_LE, profile.popularity).mean()
        uneven = (f"{popularity_skew(popularity_LE).mean():.2f}", f"{gini(popularity_LE).mean():.2f}")
        chance_cell = "" if by_chance is None else f"{by_chance:.1%}"
        table.add_row(escape(name), f"{tokens:,}", *uneven, f"{moved:.1%}", chance_cell)
    return table


def batch_table(active: ActiveExperts) -> Table:
    """By batch size: how many experts a layer has to read."""
    table = Table(title=f"active experts of a layer, {active.phase} tokens", caption="mean over layers")
    for column in ("batch", "mixed tokens", "one domain", "if uniform"):
        table.add_column(column, justify="right")
    for row, batch in enumerate(active.batch_sizes):
        same = "" if active.same_domain is None else f"{active.same_domain[row].mean():.1f}"
        table.add_row(str(batch), f"{active.mixed[row].mean():.1f}", same, f"{active.uniform[row]:.1f}")
    return table


def closing_lines(profile: RoutingProfile) -> list[str]:
    """What needs no table: convergence, drift over time, and the locality there is."""
    lines = []
    if (convergence := profile.convergence) is not None:
        lines.append(
            f"affinity is stable after {convergence.stable_at:,} tokens: within 0.05 of the distance "
            f"{convergence.floor:.3f} that remains at {convergence.tokens[-1]:,}"
            + ("; a longer trace may put it later" if convergence.may_come_later else "")
        )
    if (drift := profile.time_drift) is not None:
        lines.append(
            f"over time: {drift.to_all.mean():.1%} of the choices of a window (of {len(drift.names)}) would have to "
            f"change to match the trace, {drift.to_all_control.mean():.1%} by chance"
        )
    lines += [
        f"on {potential.num_gpus} GPUs: {potential.kept:.1%} of the pairs of adjacent layers can stay on one GPU "
        f"(contiguous {potential.contiguous:.1%}), with {potential.max_load:.2f} times the mean load on the busiest"
        for potential in profile.potentials
    ]
    return lines


def _columns(information: Information) -> tuple[np.ndarray, ...]:
    return (information.pairs, information.pairs_shuffled, information.top1, information.top1_shuffled)

"""Traces with domains, and comparisons on them, by function and by command line."""

import argparse
from io import StringIO

import numpy as np
from rich.console import Console

from conf import compose
from placement.compare_command import add_arguments, run
from placement.comparison import compare_strategies
from placement.settings import compare_settings
from profiler.trace_format import RoutingTrace, TraceWriter
from tests.support.routes import make_routes

QUICK = ("cluster=h200x2", "judge.batches=60", "judge.resamples=100", "solver.search_rounds=20")


def write_domains(path, lengths, routes=None):
    """A trace of sequences (domain, tokens); no domain where the name is None."""
    routes = make_routes(3, sum(tokens for _, tokens in lengths), 3, 8, 2) if routes is None else routes
    with TraceWriter(
        path, model="m", num_experts=8, layer_ids=[0, 1, 2], top_k=2, weights=False, token_ids=False
    ) as writer:
        for name, tokens in lengths:
            part, routes = routes[:tokens], routes[tokens:]
            writer.add_sequence(part, decode=np.ones(tokens, dtype=np.uint8), domain=name)
    return path


def compare(path, *overrides, others=()):
    with RoutingTrace.open(path) as trace:
        return compare_strategies(trace, compare_settings(compose("compare", overrides)), others, lambda line: None)


def command(path, *arguments, width=110):
    """Run the verb; returns what it prints."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags, overrides = parser.parse_known_args(["--trace", str(path), *map(str, arguments)])
    out = StringIO()
    run(flags, compose("compare", overrides), Console(file=out, width=width), lambda line: None)
    return out.getvalue()

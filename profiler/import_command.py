"""``python -m profiler import``: an engine's recording as a routing trace, or as counts where it holds no more."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from profiler.errors import InputError
from profiler.importers import IMPORTERS, ModelFacts, RecordedCounts, RecordedRoutes, Remarks, exflow
from profiler.importers.model_facts import add_model_arguments, read_model_facts
from profiler.routing_counts import RoutingCounts
from profiler.trace_header import require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``import``."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="the engine's files: all ranks and dumps of one recording"
    )
    parser.add_argument("--from", dest="engine", choices=list(IMPORTERS), required=True, help="whose recording it is")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trace or counts to write (.safetensors)")
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens-per-sequence", type=int, help="exflow: cut the tokens into sequences of this length (default: none)"
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    """Write the trace or the counts; say what was left out.

    Raises:
        InputError: a file is damaged, of another engine or model, or the output cannot be written.
    """
    from profiler.summary import counts_table, summary_table
    from profiler.trace_format import RoutingTrace

    like = [Path(flags.like)] if flags.like is not None else []
    require_output(flags.output, [*flags.files, *like])
    resolved = [path.resolve() for path in flags.files]
    if len(set(resolved)) < len(resolved):
        raise InputError(f"{flags.files[0]}: a file is named twice and would count twice; name each once")
    importer = IMPORTERS[flags.engine]
    if flags.tokens_per_sequence is not None:
        if flags.engine != "exflow" or flags.tokens_per_sequence < 1:
            raise InputError("--tokens-per-sequence is for --from exflow, with a length of at least 1; leave it away")
        importer = partial(exflow.read, tokens_per_sequence=flags.tokens_per_sequence)
    facts, remarks = read_model_facts(flags), Remarks()
    recording = importer(flags.files, facts, remarks)
    names = ", ".join(path.name for path in flags.files[:3]) + (", …" if len(flags.files) > 3 else "")
    source = f"{flags.engine}: {names}"
    if isinstance(recording, RecordedCounts):
        counts = RoutingCounts(recording.counts, facts.model, recording.layer_ids, source)
        counts.save(flags.output)
        console.print(counts_table(flags.output, counts))
    else:
        _write_trace(recording, facts, flags.output, source)
        with RoutingTrace.open(flags.output, validate=False) as trace:
            console.print(summary_table(trace))
    for line in remarks.lines():
        console.print(escape(line))


def _write_trace(routes: RecordedRoutes, facts: ModelFacts, output: Path, source: str) -> None:
    from profiler.trace_writer import TraceWriter

    writer = TraceWriter(
        output,
        model=facts.model,
        num_experts=routes.num_experts,
        layer_ids=routes.layer_ids,
        top_k=routes.top_k,
        weights=False,
        token_ids=routes.token_ids,
        model_fingerprint=facts.model_fingerprint,
        expert_bytes=facts.expert_bytes,
        source=source,
    )
    with writer:
        for sequence in routes.sequences:
            writer.add_sequence(
                sequence.experts,
                decode=sequence.decode,
                position=sequence.position,
                token_ids=sequence.token_ids,
                domain=sequence.domain,
            )

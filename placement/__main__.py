"""Command line: ``python -m placement solve|compare|evaluate|simulate|export|import``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from conf import ConfigError, compose
from conf.command_line import Verb, run_command_line
from profiler.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    verbs = [
        _verb(
            "solve",
            "Find where every expert goes, and write the plan.",
            "python -m placement solve --trace trace.safetensors -o plan.json cluster=h200x4 slots_per_gpu=+25%",
        ),
        _verb(
            "compare",
            "Judge every strategy on held-out tokens: table, JSON and plot.",
            "python -m placement compare --trace trace.safetensors -o compare.json cluster=h200x4 --plot compare.png",
        ),
        _verb(
            "evaluate",
            "Replay a trace through one plan.",
            "python -m placement evaluate --plan plan.json --trace trace.safetensors",
        ),
        _verb(
            "simulate",
            "Replay a trace on a cluster that is not there.",
            "python -m placement simulate --trace trace.safetensors cluster=h100x8x2 -o simulate.json",
        ),
        _verb(
            "export",
            "Write a plan as the placement file of a serving engine.",
            "python -m placement export --plan plan.json --to sglang -o placement.json",
        ),
        _verb(
            "import",
            "Read a serving engine's placement file as a plan.",
            "python -m placement import --from sglang placement.json --like plan.json -o imported.json",
        ),
    ]
    description = "Decide which GPU holds which expert of a Mixture-of-Experts model."
    return run_command_line("placement", description, verbs, (InputError, ConfigError), arguments)


def _verb(name: str, help_line: str, example: str) -> Verb:
    """A verb from its module ``<name>_command``."""
    module = import_module(f"placement.{name}_command")

    def run(flags: argparse.Namespace) -> None:
        from rich.console import Console
        from rich.markup import escape

        config = compose(name, flags.overrides)
        with Console(stderr=True).status("reading") as status:
            module.run(flags, config, Console(), lambda line: status.update(escape(line)))

    return Verb(name, help_line, example, module.add_arguments, run)


if __name__ == "__main__":
    sys.exit(main())

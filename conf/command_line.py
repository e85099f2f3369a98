"""The frame every command line of the project shares: verbs, overrides, and one-line errors with exit code 2."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Verb:
    """One verb of a package's command line.

    Attributes:
        name: the word typed after ``python -m <package>``.
        help: one line for the list of verbs.
        example: a full command, shown by ``--help``.
        add_arguments: adds the verb's file flags to its parser.
        run: called with the parsed flags; ``flags.overrides`` holds the ``key=value`` arguments.
    """

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong with the arguments in one line, as every other bad input is told."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def run_command_line(
    package: str,
    description: str,
    verbs: Sequence[Verb],
    input_errors: tuple[type[Exception], ...],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse ``verb --flag value key=value …``, run the verb, and turn input errors into one line on stderr.

    What the output's encoding does not have is printed as ``?``: names in files may hold any character.

    Args:
        package: the package's name, for the usage line.
        description: one line about the package.
        verbs: the verbs it has.
        input_errors: exceptions that mean bad input: printed without a traceback, exit code 2.
        arguments: the command line without the program name (default: ``sys.argv``).

    Returns:
        The exit code: 0, 2 on bad input, 130 when interrupted, or what the verb returns.
    """
    parser = _Parser(prog=f"python -m {package}", description=description)
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in verbs:
        subparser = subparsers.add_parser(
            verb.name,
            help=verb.help,
            description=verb.help,
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(subparser)
        subparser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings, see conf/")
        subparser.set_defaults(run=verb.run)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        flags = _parse(parser, arguments)
        return flags.run(flags) or 0
    except input_errors as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse with ``key=value`` arguments allowed anywhere between the flags."""
    flags, rest = parser.parse_known_args(arguments)
    for argument in [*rest, *flags.overrides]:
        if argument.startswith("-") or "=" not in argument:
            parser.error(f"unrecognized argument {argument!r}, expected flags or settings such as key=value")
    flags.overrides = [*flags.overrides, *rest]
    return flags

"""Verbs, flags, settings and exit codes of the frame that every command line shares."""

from __future__ import annotations

import argparse

import pytest

from conf import ConfigError
from conf.command_line import Verb, run_command_line


class WrongInputError(ValueError):
    """Stands for a package's own error about bad input."""


class Recorder:
    """A verb ``solve`` that keeps the flags it got and then returns, or raises, what it was told to."""

    def __init__(self, outcome: int | BaseException | None = None) -> None:
        self.outcome = outcome
        self.flags: argparse.Namespace | None = None

    def run(self, flags: argparse.Namespace) -> int | None:
        self.flags = flags
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def call(self, *arguments: str) -> int:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--trace", required=True)
            parser.add_argument("-o", "--output")

        example = "python -m placement solve --trace trace.safetensors -o plan.json seed=1"
        verbs = [
            Verb("solve", "find a plan", example, add_arguments, self.run),
            Verb("info", "say what it is", "python -m placement info", lambda parser: None, lambda flags: None),
        ]
        errors = (WrongInputError, ConfigError)
        return run_command_line("placement", "Plans placements.", verbs, errors, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trace", "t", "-o", "p", "seed=1", "cluster=large"],
        ["seed=1", "--trace", "t", "cluster=large", "-o", "p"],
        ["seed=1", "cluster=large", "--trace=t", "--output=p"],
        ["--trace", "t", "seed=1", "-o", "p", "cluster=large"],
    ],
)
def test_settings_may_stand_anywhere_and_keep_their_order(arguments: list[str]) -> None:
    recorder = Recorder()
    assert recorder.call("solve", *arguments) == 0
    assert recorder.flags is not None
    assert (recorder.flags.trace, recorder.flags.output) == ("t", "p")
    assert recorder.flags.overrides == ["seed=1", "cluster=large"]


def test_flag_value_with_an_equals_sign_is_no_setting() -> None:
    recorder = Recorder()
    assert recorder.call("solve", "--trace", "a=b") == 0
    assert recorder.flags is not None
    assert (recorder.flags.trace, recorder.flags.overrides) == ("a=b", [])


@pytest.mark.parametrize("outcome", [None, 0, 1, 3])
def test_exit_code_of_the_verb(outcome: int | None) -> None:
    assert Recorder(outcome).call("solve", "--trace", "t") == (outcome or 0)


@pytest.mark.parametrize("error", [WrongInputError("bad\n  trace 't'"), ConfigError("bad trace 't'")])
def test_bad_input_is_one_line_and_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert Recorder(error).call("solve", "--trace", "t") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: bad trace 't'\n")


def test_interruption_is_code_130_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert Recorder(KeyboardInterrupt()).call("solve", "--trace", "t") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        Recorder(ZeroDivisionError()).call("solve", "--trace", "t")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "VERB"),
        (["sovle"], "sovle"),
        (["solve"], "--trace"),
        (["solve", "--trace", "t", "--ouput", "p"], "--ouput"),
        (["solve", "--trace", "t", "--ouput=p"], "--ouput"),
        (["solve", "--trace", "t", "stray"], "stray"),
        (["solve", "stray", "--trace", "t"], "stray"),
        (["info", "stray"], "stray"),
    ],
)
def test_wrong_usage_is_code_2_and_names_the_argument(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    with pytest.raises(SystemExit) as caught:
        recorder.call(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(" --help")
    assert named in lines[0]
    assert recorder.flags is None


def test_only_what_is_required_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Recorder().call("solve")
    told = "error: the following arguments are required: --trace; see python -m placement solve --help\n"
    assert capsys.readouterr().err == told


def test_help_shows_the_verbs_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Recorder().call("--help")
    assert caught.value.code == 0
    overview = capsys.readouterr().out
    assert "Plans placements." in overview
    assert "find a plan" in overview
    with pytest.raises(SystemExit) as caught:
        Recorder().call("solve", "--help")
    assert caught.value.code == 0
    assert "python -m placement solve --trace trace.safetensors -o plan.json seed=1" in capsys.readouterr().out

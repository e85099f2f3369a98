"""Command line of the runtime: ``python -m runtime serve|generate|bench|calibrate``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from conf import ConfigError
from conf.command_line import Verb, run_command_line
from profiler.errors import InputError


def _prepare(flags: argparse.Namespace) -> None:
    """Logging and signals, alike for every verb and rank."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.INFO, format=f"%(levelname)s rank {rank}: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if rank != "0":  # rank 0 ends the others; Ctrl-C reaches the whole process group
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from runtime.launcher import end_with_launcher

        end_with_launcher()
    from transformers.utils import logging as transformers_logging

    from profiler.environment import check_environment

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    check_environment()


def _plan_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", required=True, metavar="PLAN", help="plan.json from `python -m placement solve`")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _plan_argument(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from runtime.bench_serve_flags import add_arguments

    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    decode = kinds.add_parser("decode", help="time per decode step by batch size")
    _plan_argument(decode)
    decode.add_argument("-o", "--output", metavar="FILE", help="write the rows as JSON")
    add_arguments(kinds.add_parser("serve", help="load a server and measure latencies and throughput"))


def _serve(flags: argparse.Namespace) -> int:
    from conf import compose
    from runtime.recording_settings import RecordSettings
    from runtime.serve import serve
    from runtime.server_settings import ServerSettings
    from runtime.settings import EngineSettings

    _prepare(flags)
    config = compose("serve", flags.overrides)
    record = RecordSettings.from_config(config)
    return serve(flags.plan, EngineSettings.from_config(config), ServerSettings.from_config(config), record)


def _generate(flags: argparse.Namespace) -> int:
    from conf import compose
    from runtime.generate import generate
    from runtime.requests import SamplingParameters
    from runtime.settings import EngineSettings

    _prepare(flags)
    config = compose("generate", flags.overrides)
    sampling = SamplingParameters(
        temperature=config["temperature"], top_p=config["top_p"], seed=config["seed"], max_tokens=config["max_tokens"]
    )
    return generate(flags.plan, EngineSettings.from_config(config), flags.prompt, sampling)


def _bench(flags: argparse.Namespace) -> int:
    if flags.what == "serve":
        from runtime.bench_serve import bench_serve

        return bench_serve(flags)
    from conf import compose
    from runtime.bench import DecodeBenchmark, bench_decode
    from runtime.settings import EngineSettings

    _prepare(flags)
    config = compose("bench_decode", flags.overrides)
    benchmark = DecodeBenchmark(
        batch_sizes=tuple(config["batch_sizes"]),
        context=config["context"],
        steps=config["steps"],
        warmup_steps=config["warmup_steps"],
        seed=config["seed"],
        routes=config["routes"],
    )
    return bench_decode(flags.plan, EngineSettings.from_config(config), benchmark, flags.output)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the cluster file to write (YAML)")


def _calibrate(flags: argparse.Namespace) -> int:
    from conf import compose
    from runtime.calibrate import CalibrationSettings, calibrate
    from runtime.settings import EngineSettings

    _prepare(flags)
    config = compose("calibrate", flags.overrides)
    engine = EngineSettings.from_config({key: value for key, value in config.items() if key != "model"})
    return calibrate(CalibrationSettings.from_config(config), engine, flags.output)


VERBS = (
    Verb(
        "serve",
        "serve a plan's model over an OpenAI-compatible HTTP interface",
        "python -m runtime serve --plan plan.json port=8000",
        _plan_argument,
        _serve,
    ),
    Verb(
        "generate",
        "stream one completion in the terminal",
        'python -m runtime generate --plan plan.json --prompt "In the beginning" max_tokens=64',
        _generate_arguments,
        _generate,
    ),
    Verb(
        "bench",
        "measure the runtime",
        "python -m runtime bench decode --plan plan.json batch_sizes=[1,8,32] -o decode.json\n"
        "  python -m runtime bench serve --url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200 -o serve.json",
        _bench_arguments,
        _bench,
    ),
    Verb(
        "calibrate",
        "measure this host for a model's shape: the cluster file that placement reads",
        "python -m runtime calibrate model=Qwen/Qwen3-30B-A3B -o cluster.yaml",
        _calibrate_arguments,
        _calibrate,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the runtime's command line (default: ``sys.argv``) and return its exit code."""
    if arguments is not None:
        sys.argv[1:] = arguments  # the launcher starts the other ranks with it
    description = "Serve a Mixture-of-Experts model by a placement plan."
    return run_command_line("runtime", description, VERBS, (InputError, ConfigError))


if __name__ == "__main__":
    sys.exit(main())

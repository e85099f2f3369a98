"""`python -m runtime serve`: the HTTP server on rank 0, the other ranks behind it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

from placement.plan import PlacementPlan
from runtime.distributed import end_process
from runtime.engine import Engine
from runtime.errors import first_line
from runtime.recording import check_output, start_recording
from runtime.recording_settings import RecordSettings
from runtime.server_settings import ServerSettings
from runtime.settings import EngineSettings
from runtime.start import Run, load_plan, load_tokenizer, start_run

logger = logging.getLogger(__name__)

FOLLOWER_PATIENCE_S = 10.0  # rank 0 knows more, and is to speak first
EXIT_S = 29  # after a signal; see `runtime.server_settings.MAX_DRAIN_S`


def serve(plan_path: str, settings: EngineSettings, server: ServerSettings, record: RecordSettings) -> int:
    """Serve until a signal; returns the exit code (1 where a rank died)."""
    check_output(record)
    plan, model = load_plan(plan_path, settings)
    if int(os.environ.get("RANK", "0")) != 0:
        return follow(plan, model, settings)

    from runtime.server import Placement, bind_socket, create_app, run_server, set_up_logs

    set_up_logs(server.log_format)

    listening = bind_socket(server.host, server.port)
    tokenizer = load_tokenizer(model)
    run = start_run(plan, model, settings)
    if record.record is not None:
        run.worker.record(start_recording(record, plan, model, run.worker.facts))
    engine = run.start_engine(settings)
    name = server.served_model_name or (Path(model).resolve().name if Path(model).exists() else model)
    app = create_app(
        engine,
        tokenizer,
        name,
        int(time.time()),
        Placement(plan, engine.meter, settings.exchange),
        api_key=server.api_key,
        cors_origins=server.cors_origins,
        compare_url=server.compare_url,
    )
    watch_ranks(run, engine, settings.rank_timeout_s)
    engine.start()
    try:
        failure = run_server(
            app,
            listening,
            engine,
            grace_seconds=server.drain_timeout_s,
            on_ready=lambda url: logger.info("serving %s on %s", name, url),
            on_signal=lambda: end_in_time(run),
        )
        if failure is not None:
            abort(run, failure)
    finally:
        engine.shutdown()
        end_recording(run)
        run.close()
    return 0


def follow(plan: PlacementPlan, model: str, settings: EngineSettings) -> int:
    """The life of every rank but 0: load, then execute rank 0's plans."""
    try:
        run = start_run(plan, model, settings)
        run.worker.watch_steps(settings.rank_timeout_s + FOLLOWER_PATIENCE_S, partial(end_process, run.group.rank))
        run.worker.serve()
    except RuntimeError as error:  # of this rank's own, or what torch.distributed raises when a peer is gone
        end_process(int(os.environ["RANK"]), first_line(error))
    run.close()
    return 0


def end_recording(run: Run) -> None:
    """Finish the trace under way."""
    if run.worker.recording is not None:
        run.worker.recording.close()


def watch_ranks(run: Run, engine: Engine, timeout_s: float) -> None:
    """From now on a rank that dies or hangs takes the engine down instead of the process, so that clients are told."""
    if run.ranks is not None:
        run.ranks.on_death = engine.fail
    if run.group.world_size > 1:
        run.worker.watch_steps(timeout_s, engine.fail)


def end_in_time(run: Run) -> None:
    """From now on this process has `EXIT_S` to end, whatever hangs."""
    reason = f"stopping took more than {EXIT_S} s; the ranks are killed"
    timer = threading.Timer(EXIT_S, abort, (run, reason))
    timer.daemon = True
    timer.start()


def abort(run: Run, failure: str) -> None:
    """End this process and its ranks at once with exit code 1: a collective may never return."""
    silent = "" if failure.startswith("rank ") else run.group.describe_silent()
    print(f"error: {failure}{'; ' * bool(silent)}{silent}", file=sys.stderr)
    sys.stderr.flush()
    if run.ranks is not None:
        run.ranks.kill()
    end_recording(run)
    os._exit(1)

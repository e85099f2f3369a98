"""`python -m runtime serve`: the HTTP server on rank 0, the other ranks behind it."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from placement.plan import PlacementPlan
from runtime.engine import Engine
from runtime.errors import first_line
from runtime.recording import check_output, start_recording
from runtime.settings import EngineSettings, RecordSettings, ServerSettings
from runtime.start import Run, load_plan, load_tokenizer, start_run

logger = logging.getLogger(__name__)


def serve(plan_path: str, settings: EngineSettings, server: ServerSettings, record: RecordSettings) -> int:
    """Serve until a signal; returns the exit code (1 where a rank died)."""
    check_output(record)
    plan, model = load_plan(plan_path, settings)
    if int(os.environ.get("RANK", "0")) != 0:
        return follow(plan, model, settings)

    from runtime.server import bind_socket, create_app, run_server

    listening = bind_socket(server.host, server.port)
    tokenizer = load_tokenizer(model)
    run = start_run(plan, model, settings)
    if record.record is not None:
        run.worker.record(start_recording(record, plan, model, run.worker.facts))
    engine = run.start_engine(settings)
    name = server.served_model_name or (Path(model).resolve().name if Path(model).exists() else model)
    app = create_app(engine, tokenizer, name, int(time.time()))
    watch_ranks(run, engine)
    engine.start()
    try:
        failure = run_server(app, listening, engine, on_ready=lambda url: logger.info("serving %s on %s", name, url))
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
        run.worker.serve()
    except RuntimeError as error:  # of this rank's own, or what torch.distributed raises when a peer is gone
        print(f"error: rank {os.environ['RANK']} stopped: {first_line(error)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # leaving the group in order would wait for the lost ranks
    run.close()
    return 0


def end_recording(run: Run) -> None:
    """Finish the trace under way."""
    if run.worker.recording is not None:
        run.worker.recording.close()


def watch_ranks(run: Run, engine: Engine) -> None:
    """From now on a rank that dies takes the engine down instead of the process, so that clients are told."""
    if run.ranks is not None:
        run.ranks.on_death = engine.fail


def abort(run: Run, failure: str) -> None:
    """End this process and its ranks at once with exit code 1: a collective may never return."""
    print(f"error: {failure}", file=sys.stderr)
    sys.stderr.flush()
    if run.ranks is not None:
        run.ranks.kill()
    end_recording(run)
    os._exit(1)

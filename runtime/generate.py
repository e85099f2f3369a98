"""`python -m runtime generate`: one streamed completion in the terminal."""

from __future__ import annotations

import os
import queue

from runtime.requests import SamplingParameters, TokenEvent
from runtime.serve import abort, follow, watch_ranks
from runtime.settings import EngineSettings
from runtime.start import load_plan, load_tokenizer, start_run


def generate(plan_path: str, settings: EngineSettings, prompt: str, sampling: SamplingParameters) -> int:
    """Print a completion of the prompt as it is generated; returns the exit code."""
    plan, model = load_plan(plan_path, settings)
    if int(os.environ.get("RANK", "0")) != 0:
        return follow(plan, model, settings)

    from runtime.server.detokenizer import DetokenizerFactory

    tokenizer = load_tokenizer(model)
    run = start_run(plan, model, settings)
    engine = run.start_engine(settings)
    watch_ranks(run, engine, settings.rank_timeout_s)
    engine.start()
    try:
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        engine.submit(tokenizer(prompt)["input_ids"], sampling, events.put)
        detokenizer = DetokenizerFactory(tokenizer)()
        while True:
            event = events.get()
            if event.finish_reason == "error":
                abort(run, event.error or "the engine failed")
            if event.token_id is not None:
                print(detokenizer.push(event.token_id), end="", flush=True)
            if event.finish_reason is not None:
                break
        print(detokenizer.flush())
    finally:
        engine.shutdown()
        run.close()
    return 0

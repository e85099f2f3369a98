"""A rank's worker on the native path: a native model that executes step plans."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.distributed import RankGroup
from runtime.load import Load
from runtime.native.model import NativeModel
from runtime.recording import RouteRecording
from runtime.requests import TokenLogprobs
from runtime.step_plan import StepPlan
from runtime.step_watch import StepWatch
from runtime.worker_interface import ModelFacts, Tokens, Worker

TAKE_LOAD = "take_load"  # key of the message upon which every rank hands over what it has counted


class NativeWorker(Worker):
    """Executes step plans; several ranks execute the same ones and find the same tokens.

    Args:
        model: with this rank's weights.
        facts: about the model.
        group: all ranks.
    """

    def __init__(self, model: NativeModel, facts: ModelFacts, group: RankGroup) -> None:
        self.model, self.facts, self.group = model, facts, group
        ranks = model.decoder.ranks
        self.everyone_holds_all = ranks is None or ranks.everyone_holds_all
        self._logprobs: dict[int, TokenLogprobs] = {}
        self._watch: StepWatch | None = None
        self.overlaps = group.device.type == "cuda"

    def launch(self, step: StepPlan) -> Tokens:
        """Begin a step; see `Worker.launch`."""
        if self._watch is not None:
            self._watch.began()
        new = self.model.launch(step)

        def tokens() -> dict[int, int]:
            known = new()
            if self._watch is not None:
                self._watch.ended()
            self._logprobs = new.logprobs
            return known

        return tokens

    def record(self, recording: RouteRecording) -> None:
        """Hand every pass's routes over; see `Worker.record`."""
        self.recording = self.model.recording = recording

    def watch_steps(self, timeout_s: float, on_overdue: Callable[[str], None]) -> None:
        """Notice a step that does not end; see `Worker.watch_steps`."""
        self._watch = StepWatch(timeout_s, on_overdue)
        self._watch.start()

    def execute(self, step: StepPlan) -> dict[int, int]:
        """Run one step; see `Worker.execute`."""
        return self.launch(step)()

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the last step's tokens; see `Worker.logprobs`."""
        return self._logprobs

    def take_load(self) -> Load | None:
        """What the devices of all ranks have counted; see `Worker.take_load`. For rank 0, whom the others follow."""
        if self.group.world_size > 1:
            self.group.broadcast_json({TAKE_LOAD: True})
        return self._gather_load()

    def _gather_load(self) -> Load | None:
        load = self.model.take_load()
        if load is None or self.group.world_size == 1:
            return load
        widths = self.group.gather_tokens(torch.tensor([load.pairs.shape[2]])).flatten().tolist()
        missing = max(widths) - load.pairs.shape[2]  # a rank may have fewer slots than another
        mine = torch.stack([load.pairs, load.active])  # [2, L, 1, P]
        mine = torch.nn.functional.pad(mine, (0, missing))
        pairs, active = self.group.gather_tokens(mine.flatten()).view(-1, *mine.shape)[:, :, :, 0].permute(1, 2, 0, 3)
        shape = self.model.decoder.shape
        rows = int(pairs.sum()) // shape.top_k  # of all MoE layers
        assert self.model.decoder.ranks is not None
        sent = self.model.decoder.ranks.sent_bytes(rows, shape.width * self.facts.dtype.itemsize, shape.top_k)
        return Load(pairs, active, load.steps, sent)

    def serve(self) -> None:
        """Follow rank 0; see `Worker.serve`. The next step is begun before the last one's tokens are waited for."""
        before: Tokens | None = None
        while True:
            message = self.group.broadcast_json()
            if TAKE_LOAD in message:
                self._gather_load()
                continue
            step = StepPlan.from_json(message)
            if step.stop:
                return
            tokens = self.launch(step)
            if before is not None:
                before()
            before = tokens

    def replay(self, routes: torch.Tensor | None) -> None:
        """Take routes as given; see `Worker.replay`."""
        self.model.replay(routes)

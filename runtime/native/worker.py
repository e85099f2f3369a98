"""A rank's worker on the native path: a native model that executes step plans."""

from __future__ import annotations

import torch

from runtime.distributed import RankGroup
from runtime.load import Load
from runtime.native.model import NativeModel
from runtime.requests import TokenLogprobs
from runtime.step_plan import StepPlan
from runtime.worker_interface import ModelFacts, Tokens, Worker


class NativeWorker(Worker):
    """Executes step plans; several ranks execute the same ones and find the same tokens.

    Args:
        model: with this rank's weights.
        facts: about the model.
        group: all ranks.
    """

    everyone_holds_all = True

    def __init__(self, model: NativeModel, facts: ModelFacts, group: RankGroup) -> None:
        self.model, self.facts, self.group = model, facts, group
        self._logprobs: dict[int, TokenLogprobs] = {}
        self.overlaps = group.device.type == "cuda"

    def launch(self, step: StepPlan) -> Tokens:
        """Begin a step; see `Worker.launch`."""
        new = self.model.launch(step)

        def tokens() -> dict[int, int]:
            known = new()
            self._logprobs = new.logprobs
            return known

        return tokens

    def execute(self, step: StepPlan) -> dict[int, int]:
        """Run one step; see `Worker.execute`."""
        return self.launch(step)()

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the last step's tokens; see `Worker.logprobs`."""
        return self._logprobs

    def take_load(self) -> Load | None:
        """What the device has counted; see `Worker.take_load`."""
        return self.model.take_load()

    def replay(self, routes: torch.Tensor | None) -> None:
        """Take routes as given; see `Worker.replay`."""
        self.model.replay(routes)

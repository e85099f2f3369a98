"""What the engine and the benchmarks ask of a rank's worker, on whichever path it runs the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.distributed import RankGroup
from runtime.load import Load
from runtime.requests import TokenLogprobs
from runtime.step_plan import StepPlan

Tokens = Callable[[], dict[int, int]]  # waits for the new tokens of a step

if TYPE_CHECKING:
    from runtime.recording import RouteRecording

NO_TOKEN = -1  # instead of a token, where the logits of a sequence are not finite


@dataclass(frozen=True)
class StepReads:
    """What a decode step must read from memory.

    Attributes:
        expert_bytes: of one expert in one layer.
        num_moe_layers: layers with routed experts.
        other_bytes: of all other weights that every step reads.
        kv_bytes: of one token's keys and values in one layer.
        windows: per layer, the last so many tokens that it reads, or None for all.
    """

    expert_bytes: int
    num_moe_layers: int
    other_bytes: int
    kv_bytes: int
    windows: tuple[int | None, ...]

    def total(self, active_experts: float, batch: int, context: float) -> float:
        """Bytes of a step of so many sequences with so many tokens each, and active experts per layer."""
        tokens = sum(context if window is None else min(context, window) for window in self.windows)
        experts = active_experts * self.num_moe_layers * self.expert_bytes
        return experts + self.other_bytes + batch * tokens * self.kv_bytes


@dataclass(frozen=True)
class CacheSize:
    """How many pages a cache has, and of how many tokens each."""

    num_pages: int
    page_size: int


@dataclass(frozen=True)
class ModelFacts:
    """What is to be known of the loaded model.

    Attributes:
        path: ``native`` or ``universal``.
        vocabulary: number of token ids.
        dtype: of the weights.
        max_context: the most tokens of one sequence, prompt and generated.
        eos_token_ids: tokens that end a sequence.
        reads: of a decode step, where the path knows.
        cache: of every rank that holds sequences of its own; None where caches grow as needed.
        expert_bytes: of one expert in one layer, where this rank has any.
    """

    path: str
    vocabulary: int
    dtype: torch.dtype
    max_context: int
    eos_token_ids: tuple[int, ...]
    reads: StepReads | None = None
    cache: CacheSize | None = None
    expert_bytes: int | None = None


class Worker(ABC):
    """One rank at work: executes step plans; all ranks run the same plans in the same order.

    Attributes:
        group: all ranks.
        facts: about the model.
        model: says whether sequences may join a running batch, and prompts be fed in pieces (``can_merge``), and
            whether prompts of different lengths can be fed together (``can_pad``).
        everyone_holds_all: whether every rank holds every sequence.
        overlaps: whether a step that has been launched goes on by itself.
        recording: on rank 0, where routes are recorded.
    """

    group: RankGroup
    facts: ModelFacts
    model: Any
    everyone_holds_all: bool
    overlaps = False
    recording: RouteRecording | None = None

    @property
    @abstractmethod
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """On rank 0, by sequence: of the tokens asked for last, as far as their requests want them."""

    @abstractmethod
    def execute(self, step: StepPlan) -> dict[int, int]:
        """Run one step.

        Returns:
            The new token of every sequence that took part, on every rank; `NO_TOKEN` where there is none.
        """

    def launch(self, step: StepPlan) -> Tokens:
        """Begin a step, after those launched before; its tokens are asked for once, in the order of the steps."""
        tokens = self.execute(step)
        return lambda: tokens

    @abstractmethod
    def replay(self, routes: torch.Tensor | None) -> None:
        """For measurements: take the experts of this rank's sequences in the next decode steps from here.

        Args:
            routes: logical ids, int32 ``[steps, MoE layers, sequences, K]``; None routes as usual again.
        """

    def record(self, recording: RouteRecording) -> None:
        """Hand the routes of every pass from now on to a recording (rank 0)."""
        self.recording = recording

    def take_load(self) -> Load | None:
        """Work of all slots since the last call; None on ranks that do not know it. Called between steps."""
        return None

    def watch_steps(self, timeout_s: float, on_overdue: Callable[[str], None]) -> None:  # noqa: B027
        """From now on call with a line that says so, once, where a step does not end within the timeout.

        Nothing to do where collectives notice by themselves that a rank does not answer.
        """

    def serve(self) -> None:
        """Follow rank 0's plans until it says stop (ranks other than 0)."""
        while True:
            step = StepPlan.from_json(self.group.broadcast_json())
            if step.stop:
                return
            self.execute(step)


def eos_token_ids(*configs: Any) -> tuple[int, ...]:
    """End-of-sequence tokens from the first configuration that names any."""
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(int(token) for token in found) if isinstance(found, list) else (int(found),)
    return ()

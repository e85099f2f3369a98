"""Choosing the next tokens of a rank's sequences from their logits, repeatably per request.

`kernels.sample` draws with temperature, nucleus and seed. What a request asks for beyond that acts on its logits first,
in this order: no end before ``min_tokens``, bias, penalties (repetition, then frequency and presence), ``min_p``,
``top_k``. The last two look at the logits divided by the temperature; the nucleus is of what they leave.

Shape legend: R sequences, V vocabulary.

Source: the order is that of vLLM's sampler; penalties and bias as in OpenAI's API reference, the repetition penalty of
N. Keskar et al., "CTRL: a conditional transformer language model for controllable generation" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.sample import sample
from kernels.sample.reference import MIN_TEMPERATURE
from runtime.logprobs import logprob_rows, read_rows
from runtime.requests import SamplingParameters, TokenLogprobs
from runtime.step_plan import Admission
from runtime.worker_interface import NO_TOKEN

ROWS_AT_ONCE = 32  # logits of so many sequences are changed together; more would take gigabytes with large vocabularies


class History:
    """One sequence as its sampling sees it.

    Args:
        sampling: resolved parameters.
        tokens: of the prompt, and those generated before the sequence was preempted.
        num_generated: how many of them, at the end, were generated.

    Attributes:
        position: of the token to choose in its sequence, for which its noise is drawn.
    """

    def __init__(self, sampling: SamplingParameters, tokens: Sequence[int], num_generated: int = 0) -> None:
        self.sampling, self.num_generated, self.position = sampling, num_generated, len(tokens)
        self._tokens = tokens if sampling.has_penalties else ()
        self._counts_2V: torch.Tensor | None = None

    def counts(self, like_V: torch.Tensor) -> torch.Tensor:
        """How often each token is in the prompt and was generated, int32 ``[2, V]`` beside the logits ``like_V``."""
        if self._counts_2V is None:
            prompt_tokens = len(self._tokens) - self.num_generated
            counts = [
                torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=len(like_V))[: len(like_V)]
                for tokens in (self._tokens[:prompt_tokens], self._tokens[prompt_tokens:])
            ]
            self._counts_2V = _upload(torch.stack(counts), torch.int32, like_V)
            self._tokens = ()
        return self._counts_2V

    def add(self, token_1: torch.Tensor, one_1: torch.Tensor) -> None:
        """Take in the token that was chosen, int64 ``[1]``; ``one_1`` is an int32 1 beside it."""
        self.position += 1
        self.num_generated += 1
        if self._counts_2V is not None:
            self._counts_2V[1].index_add_(0, token_1, one_1)

    def shifts(self) -> list[tuple[int, float]]:
        """(token, what its logit gains) for the next choice, bias and forbidden ends."""
        early = self.num_generated < self.sampling.min_tokens
        forbidden = [(token, -math.inf) for token in self.sampling.stop_token_ids] if early else []
        return [*forbidden, *self.sampling.logit_bias]


class Sampler:
    """Chooses the tokens of sequences between their admission and their retirement.

    Nothing here but `choose` waits for the device.
    """

    def __init__(self) -> None:
        self._histories: dict[int, History] = {}

    def admit(self, admission: Admission) -> None:
        """Begin a sequence."""
        self._histories[admission.sequence] = History(admission.sampling, admission.tokens, admission.generated)

    def retire(self, sequences: Sequence[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        for sequence in sequences:
            self._histories.pop(sequence, None)

    @torch.inference_mode()
    def choose(
        self, sequences: Sequence[int], logits_RV: torch.Tensor
    ) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
        """Choose the next token of sequences that were all admitted.

        Returns:
            Their tokens, `NO_TOKEN` where logits are not finite; and log-probabilities, where they are asked for.
        """
        histories = [self._histories[sequence] for sequence in sequences]
        chosen_R = draw(logits_RV, histories)
        chosen_R.masked_fill_(~logits_RV.amax(dim=-1).isfinite(), NO_TOKEN)  # NaN is the greatest value to amax, too
        self.choose_again(sequences, logits_RV, chosen_R)
        asking, rows = self.take_in(sequences, logits_RV, chosen_R)
        tokens = dict(zip(sequences, chosen_R.tolist(), strict=True))
        return tokens, read_rows(asking, rows) if rows is not None else {}

    @torch.inference_mode()
    def choose_again(self, sequences: Sequence[int], logits_RV: torch.Tensor, chosen_R: torch.Tensor) -> bool:
        """Replace, in place, what temperature, nucleus and seed chose for sequences that ask for more.

        Args:
            sequences: of the rows; those that were not admitted here ask for nothing.
            logits_RV: of the model.
            chosen_R: int64; `NO_TOKEN` stays.

        Returns:
            Whether any row was chosen again.
        """
        found = [
            (row, self._histories[sequence]) for row, sequence in enumerate(sequences) if sequence in self._histories
        ]
        again = [(row, history) for row, history in found if history.sampling.changes_logits]
        for start in range(0, len(again), ROWS_AT_ONCE):
            places, histories = zip(*again[start : start + ROWS_AT_ONCE], strict=True)
            rows = _upload(places, torch.int64, logits_RV)
            tokens = draw(adjust_logits(logits_RV[rows], histories), histories)
            chosen_R[rows] = tokens.where(chosen_R[rows] != NO_TOKEN, NO_TOKEN)
        return bool(again)

    @torch.inference_mode()
    def take_in(
        self, sequences: Sequence[int], logits_RV: torch.Tensor, chosen_R: torch.Tensor
    ) -> tuple[list[int], torch.Tensor | None]:
        """Go on by the chosen tokens.

        Returns:
            The sequences that ask for log-probabilities, and these as `logprob_rows` gives them; None for no sequences.
        """
        asked: dict[int, int] = {}
        if not self._histories:
            return [], None
        known_R, one_1 = chosen_R.clamp(min=0), torch.ones(1, dtype=torch.int32, device=chosen_R.device)
        for row, sequence in enumerate(sequences):
            history = self._histories.get(sequence)
            if history is not None:
                history.add(known_R[row : row + 1], one_1)
                if history.sampling.logprobs is not None:
                    asked[row] = history.sampling.logprobs
        return [sequences[row] for row in asked], logprob_rows(logits_RV, chosen_R, asked) if asked else None


def draw(logits_RV: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
    """Choose by temperature, nucleus and seed alone; int64 ``[R]``."""
    settings = [history.sampling for history in histories]
    if not logits_RV.is_cuda and all(sampling.temperature == 0 for sampling in settings):
        return logits_RV.argmax(dim=-1)  # what the reference takes, less the noise that it would make
    top_p_R = _numbers([sampling.top_p for sampling in settings], logits_RV)
    return sample(
        logits_RV,
        _numbers([sampling.temperature for sampling in settings], logits_RV),
        _upload([sampling.seed for sampling in settings], torch.int64, logits_RV),
        _upload([history.position for history in histories], torch.int64, logits_RV),
        top_p_R if any(sampling.top_p < 1 for sampling in settings) else None,
    )


def adjust_logits(logits_RV: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
    """Logits from which `draw` chooses as requests ask, float32 ``[R, V]``; -inf where a token is ruled out."""
    logits_RV = logits_RV.to(torch.float32, copy=True)
    _shift(logits_RV, histories)
    for applies, change in (
        (lambda sampling: sampling.has_penalties, _penalise),
        (lambda sampling: sampling.min_p > 0 and sampling.temperature > 0, _keep_likely),
        (lambda sampling: 0 < sampling.top_k < logits_RV.shape[1] and sampling.temperature > 0, _keep_first),
    ):
        rows = [row for row, history in enumerate(histories) if applies(history.sampling)]
        if rows:
            index = _upload(rows, torch.int64, logits_RV)
            logits_RV[index] = change(logits_RV[index], [histories[row] for row in rows])
    return logits_RV


def _shift(logits_RV: torch.Tensor, histories: Sequence[History]) -> None:
    """Add biases and forbid ends, in place; tokens that the model does not have are left out."""
    shifts = [
        (row, token, gain)
        for row, history in enumerate(histories)
        for token, gain in history.shifts()
        if token < logits_RV.shape[1]
    ]
    if shifts:
        rows, tokens, gains = zip(*shifts, strict=True)
        index = _upload(rows, torch.int64, logits_RV), _upload(tokens, torch.int64, logits_RV)
        logits_RV.index_put_(index, _numbers(gains, logits_RV), accumulate=True)


def _penalise(logits_RV: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
    """Make tokens that came before less likely (or more, by penalties that reward)."""
    settings = [history.sampling for history in histories]
    prompt_RV, generated_RV = torch.stack([history.counts(logits_RV[0]) for history in histories], dim=1)
    repetition = _numbers([sampling.repetition_penalty for sampling in settings], logits_RV)[:, None]
    frequency = _numbers([sampling.frequency_penalty for sampling in settings], logits_RV)[:, None]
    presence = _numbers([sampling.presence_penalty for sampling in settings], logits_RV)[:, None]
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
    logits_RV = torch.where(prompt_RV + generated_RV > 0, repeated_RV, logits_RV)
    return logits_RV - frequency * generated_RV - presence * (generated_RV > 0)


def _keep_likely(logits_RV: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
    """Rule out what is less likely than ``min_p`` times the most likely token."""
    temperature = _numbers([history.sampling.temperature for history in histories], logits_RV)[:, None]
    least = _numbers([math.log(history.sampling.min_p) for history in histories], logits_RV)[:, None]
    below_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature.clamp(min=MIN_TEMPERATURE)
    return logits_RV.masked_fill(below_RV < least, -math.inf)


def _keep_first(logits_RV: torch.Tensor, histories: Sequence[History]) -> torch.Tensor:
    """Rule out all but the ``top_k`` greatest logits, lower ids first among equals."""
    most = [history.sampling.top_k for history in histories]
    ranks = _upload(most, torch.int64, logits_RV)[:, None]
    greatest = logits_RV.topk(max(most), dim=-1).values
    last = greatest.gather(1, ranks - 1)
    above_RV, equal_RV = logits_RV > last, logits_RV == last
    room = ranks - above_RV.sum(dim=-1, keepdim=True)
    return logits_RV.masked_fill(~(above_RV | (equal_RV & (equal_RV.cumsum(dim=-1) <= room))), -math.inf)


def _numbers(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return _upload(values, torch.float32, like)


def _upload(values: Sequence[Any] | torch.Tensor, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Numbers beside another tensor, without waiting for what its device is doing."""
    source = torch.as_tensor(values, dtype=dtype)
    return source.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else source

"""What sampling means, said slowly: one token at a time, in float64, as requests' fields are documented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.sample.reference import gumbel_noise
from runtime.requests import SamplingParameters


@dataclass
class Choice:
    """One choice.

    Attributes:
        logits: after bias and penalties.
        left: tokens that ``min_p`` and ``top_k`` leave, the likeliest first.
        nucleus: those of ``left`` that ``top_p`` leaves.
        token: the winner of the draw.
        margin: how far the closest decision was from going the other way.
    """

    logits: np.ndarray
    left: list[int]
    nucleus: list[int]
    token: int
    margin: float


def slow_choice(
    logits: Sequence[float], sampling: SamplingParameters, prompt: Sequence[int], generated: Sequence[int]
) -> Choice:
    """Choose the token after ``prompt`` and ``generated``; the seed must be a number."""
    changed = np.array(logits, dtype=np.float64)
    if len(generated) < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            changed[token] = -np.inf
    for token, bias in sampling.logit_bias:
        changed[token] += bias
    for token in {*prompt, *generated}:
        factor = sampling.repetition_penalty
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
    for token in set(generated):
        changed[token] -= sampling.frequency_penalty * list(generated).count(token) + sampling.presence_penalty
    order = sorted(np.flatnonzero(np.isfinite(changed)).tolist(), key=lambda token: (-changed[token], token))
    if sampling.temperature == 0:
        return Choice(changed, order, order, order[0], _gap(changed, order))
    share = np.exp((changed - changed[order[0]]) / sampling.temperature)  # of the likeliest token's probability
    margins = [abs(share[token] - sampling.min_p) for token in order if 0 < share[token] < 1]
    left = [token for token in order if share[token] >= sampling.min_p]
    left = left[: sampling.top_k or None]
    nucleus: list[int] = []
    mass = 0.0
    for token in left:
        if nucleus and mass >= sampling.top_p:
            break
        nucleus.append(token)
        mass += share[token] / share[left].sum()
        margins.append(abs(mass - sampling.top_p) if sampling.top_p < 1 else np.inf)
    assert sampling.seed is not None
    position = len(prompt) + len(generated)
    noise = gumbel_noise(torch.tensor([sampling.seed]), torch.tensor([position]), len(changed))[0].double().numpy()
    score = changed / sampling.temperature + noise
    best = sorted(nucleus, key=lambda token: -score[token])
    return Choice(changed, left, nucleus, best[0], min([*margins, _gap(score, best)]))


def _gap(values: np.ndarray, order: Sequence[int]) -> float:
    return float(values[order[0]] - values[order[1]]) if len(order) > 1 else np.inf

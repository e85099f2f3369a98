"""95% bootstrap intervals of the metrics of a replay, by the percentile method.

What an interval covers depends on what is resampled:

* Steps (``step_us``, ``active_ratio``): the luck of the draw of steps from *these* held-out tokens. It shrinks with
  more steps, and says nothing of how other prompts would do.
* Sequences (localities, GPUs per token, loads): the luck of which sequences were held out, as if others of the same
  kind had been recorded. With copies the tokens of a sequence are those that were drawn. It says nothing of prompts of
  another kind, nor of solving on other sequences; and few sequences make it too narrow. Where loads are almost even, a
  maximum over GPUs is higher in resamples than in the sequences themselves, so that the interval of a load leans
  upwards and can lie above its figure.

Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

Shape suffixes: N steps, S sequences, R resamples, L layers, G GPUs, V quantities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.metrics import TokenSums

#: Share of the resamples that an interval leaves out at either end.
TAIL = 0.025
#: Values of resamples handled at once; bounds the memory.
VALUES_AT_ONCE = 2**22

TOKEN_METRICS = ("gpus_per_token", "pair_locality", "top1_transition_locality")


class Interval(NamedTuple):
    """A 95% percentile interval, in the unit of what it is of."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance from end to end; the interval need not be symmetric."""
        return (self.high - self.low) / 2


def step_intervals(values_VN: NDArray[np.float64], resamples: int, seed: int) -> list[Interval | None]:
    """Intervals of means over steps.

    Args:
        values_VN: [V, N], per quantity and step. All quantities are resampled alike, so that the difference of two
            plans' times, step by step, is a quantity like any other: its interval is that of a paired comparison.
        resamples: R.
        seed: of the draw.

    Returns:
        One interval per quantity; None where there is but one step.
    """
    num_steps = values_VN.shape[1]
    if num_steps < 2:
        return [None] * len(values_VN)
    draws = _weights(num_steps, resamples, seed, num_steps)
    means_RV = np.concatenate([weights_RN.astype(np.float64) @ values_VN.T for weights_RN in draws]) / num_steps
    return [_interval(means_R) for means_R in means_RV.T]


def token_intervals(sums: TokenSums, resamples: int, seed: int) -> dict[str, Interval | None]:
    """Intervals of the token metrics, by name: see ``TOKEN_METRICS``; None where there is but one sequence.

    Args:
        sums: by sequence.
        resamples: R. A resample without any token is left out.
        seed: of the draw.
    """
    num_sequences = len(sums.tokens)
    if num_sequences < 2:
        return dict.fromkeys(TOKEN_METRICS)
    draws = _weights(num_sequences, resamples, seed, num_sequences)
    means_R3 = np.concatenate([sums.means(weights_RS[weights_RS @ sums.tokens > 0]) for weights_RS in draws])
    return {name: _interval(means_R) for name, means_R in zip(TOKEN_METRICS, means_R3.T, strict=True)}


def load_intervals(loads_SLG: NDArray[np.float64], resamples: int, seed: int) -> dict[str, Interval | None]:
    """Intervals of ``load_mean`` and ``load_max``; None where there is but one sequence.

    Args:
        loads_SLG: [S, L, G], token–expert pairs per sequence, layer and GPU; some in every sequence and layer.
        resamples: R.
        seed: of the draw.
    """
    num_sequences, num_layers, num_gpus = loads_SLG.shape
    if num_sequences < 2:
        return dict.fromkeys(("load_mean", "load_max"))
    flat = loads_SLG.reshape(num_sequences, -1)
    found = []
    for weights_RS in _weights(num_sequences, resamples, seed, max(flat.shape)):
        loads_RLG = (weights_RS.astype(np.float64) @ flat).reshape(-1, num_layers, num_gpus)
        ratios_RL = loads_RLG.max(axis=2) / loads_RLG.mean(axis=2)
        found.append(np.stack([ratios_RL.mean(axis=1), ratios_RL.max(axis=1)]))
    mean_R, max_R = np.concatenate(found, axis=1)
    return {"load_mean": _interval(mean_R), "load_max": _interval(max_R)}


def _weights(size: int, resamples: int, seed: int, width: int) -> Iterator[NDArray[np.int64]]:
    """How often each of so many resamples with replacement holds each thing: [R, size], some resamples at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, VALUES_AT_ONCE // width)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def _interval(values_R: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values_R, [TAIL, 1 - TAIL])
    return Interval(float(low), float(high))

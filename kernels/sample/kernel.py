"""Triton kernels of sampling: a race over parts of the vocabulary, then one program per row that names the winner.

The nucleus needs no sort. The winner of the whole vocabulary is checked by adding up what is likelier than it. If that
reaches the mass, it and all that is less likely are outside, and the best of the likelier ones, found in the same pass,
is checked next. The first that passes is the best of the nucleus. The first check is spread over the GPU like the race;
whatever comes after it, seldom more than one pass, is one program's work.

Shape legend: B sequences, V vocabulary, C parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap
from kernels.sample.reference import MIN_TEMPERATURE

PART = 4096
BLOCK = 8192
NO_TOKEN = 2**31 - 1


@triton.jit
def _mix(x):
    """Spread the bits of 32-bit words (the finaliser of MurmurHash3)."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_key(seeds, positions, row):
    """Hash of a row's seed and position."""
    seed = tl.load(seeds + row).to(tl.int64)
    key = _mix(seed.to(tl.uint32) ^ 0x9E3779B1)
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    return _mix(key ^ tl.load(positions + row).to(tl.uint32))


@triton.jit
def _noise(key, token):
    """Gumbel noise of tokens, as `kernels.sample.reference.gumbel_noise` defines it."""
    bits = _mix(_mix(token.to(tl.uint32) * 0x9E3779B1 + key) ^ key)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    waiting_time = tl.where(uniform < 0.0009765625, uniform + 0.5 * uniform * uniform, -tl.log(1 - uniform))
    return -tl.log(tl.minimum(waiting_time, 22.0))


@triton.jit
def _best(score, token, best_score, best_token, NO_TOKEN: tl.constexpr):
    """The greater of a best pair and a block's greatest score, the lower token of equal ones."""
    block_score = tl.max(score, axis=0)
    block_token = tl.min(tl.where(score == block_score, token, NO_TOKEN), axis=0)
    wins = (block_score > best_score) | ((block_score == best_score) & (block_token < best_token))
    return tl.where(wins, block_score, best_score), tl.where(wins, block_token, best_token)


@triton.jit
def _race(
    logits,
    temperatures,
    seeds,
    positions,
    scores,
    tokens,
    peaks,
    V,
    row_stride,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * PART + tl.arange(0, PART)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature = tl.load(temperatures + row)
    logit = tl.load(logits + row * row_stride + token, mask=token < V, other=-float("inf")).to(tl.float32)
    scaled = logit
    score = logit
    if temperature != 0:
        scaled = logit / tl.maximum(temperature, MIN_TEMPERATURE)
        score = scaled + _noise(_row_key(seeds, positions, row), token)
    best_score, best_token = _best(score, token, -float("inf"), NO_TOKEN, NO_TOKEN)
    tl.store(scores + row * PARTS + part, best_score)
    tl.store(tokens + row * PARTS + part, best_token)
    tl.store(peaks + row * PARTS + part, tl.max(scaled, axis=0))


@triton.jit
def _winner(scores, tokens, row, V, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, NO_TOKEN: tl.constexpr):
    """The best token of a row's parts; a valid one even where scores are NaN."""
    part = tl.arange(0, BLOCK_PARTS)
    score = tl.load(scores + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    token = tl.load(tokens + row * PARTS + part, mask=part < PARTS, other=NO_TOKEN)
    _, winner = _best(score, token, -float("inf"), NO_TOKEN, NO_TOKEN)
    return tl.minimum(winner, V - 1)


@triton.jit
def _row_peak(peaks, row, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The greatest scaled logit of a row."""
    part = tl.arange(0, BLOCK_PARTS)
    return tl.max(tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=-float("inf")), axis=0)


@triton.jit
def _weigh(source, token, winner, temperature, peak, key, V):
    """Of a block of tokens: its mass, the mass likelier than the winner, and the scores of those, else -inf."""
    limit = tl.load(source + winner).to(tl.float32) / temperature
    logit = tl.load(source + token, mask=token < V, other=-float("inf")).to(tl.float32)
    scaled = logit / temperature
    weight = tl.exp(scaled - peak)
    above = (scaled > limit) | ((scaled == limit) & (token < winner))
    score = tl.where(above, scaled + _noise(key, token), -float("inf"))
    return tl.sum(weight, axis=0), tl.sum(tl.where(above, weight, 0.0), axis=0), score


@triton.jit
def _check(
    logits,
    temperatures,
    seeds,
    positions,
    top_ps,
    scores,
    tokens,
    peaks,
    checked,
    next_tokens,
    V,
    row_stride,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PART: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature = tl.load(temperatures + row)
    if (temperature == 0) | (tl.load(top_ps + row) >= 1):
        return
    winner = _winner(scores, tokens, row, V, PARTS, BLOCK_PARTS, NO_TOKEN)
    peak = _row_peak(peaks, row, PARTS, BLOCK_PARTS)
    token = part * PART + tl.arange(0, PART)
    key = _row_key(seeds, positions, row)
    mass, likelier, score = _weigh(
        logits + row * row_stride, token, winner, tl.maximum(temperature, MIN_TEMPERATURE), peak, key, V
    )
    next_score, next_token = _best(score, token, -float("inf"), NO_TOKEN, NO_TOKEN)
    found = checked + (row * PARTS + part) * 3
    tl.store(found, mass)
    tl.store(found + 1, likelier)
    tl.store(found + 2, next_score)
    tl.store(next_tokens + row * PARTS + part, next_token)


@triton.jit
def _name_winner(
    logits,
    temperatures,
    seeds,
    positions,
    top_ps,
    scores,
    tokens,
    peaks,
    checked,
    next_tokens,
    chosen,
    V,
    row_stride,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUCLEUS: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    winner = _winner(scores, tokens, row, V, PARTS, BLOCK_PARTS, NO_TOKEN)
    if NUCLEUS:
        temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
        if (temperature != 0) & (top_p < 1):
            part = tl.arange(0, BLOCK_PARTS)
            found, there = checked + (row * PARTS + part) * 3, part < PARTS
            mass = tl.sum(tl.load(found, mask=there, other=0.0), axis=0)
            likelier = tl.sum(tl.load(found + 1, mask=there, other=0.0), axis=0)
            next_score = tl.load(found + 2, mask=there, other=-float("inf"))
            next_token = tl.load(next_tokens + row * PARTS + part, mask=there, other=NO_TOKEN)
            _, best_token = _best(next_score, next_token, -float("inf"), NO_TOKEN, NO_TOKEN)
            temperature = tl.maximum(temperature, MIN_TEMPERATURE)
            peak = _row_peak(peaks, row, PARTS, BLOCK_PARTS)
            key = _row_key(seeds, positions, row)
            while (likelier >= top_p * mass) & (likelier > 0):  # the likeliest token is always inside
                winner = tl.minimum(best_token, V - 1)
                likelier = 0.0
                best_score, best_token = -float("inf"), NO_TOKEN
                for start in range(0, V, BLOCK):
                    token = start + tl.arange(0, BLOCK)
                    _, weight, score = _weigh(logits + row * row_stride, token, winner, temperature, peak, key, V)
                    likelier += weight
                    best_score, best_token = _best(score, token, best_score, best_token, NO_TOKEN)
    tl.store(chosen + row, winner.to(tl.int64))


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `sample` computes, on a GPU or in the interpreter; the same arguments and results."""
    batch, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, PART)
    nucleus = top_p is not None
    chosen = torch.empty(batch, dtype=torch.int64, device=logits.device)
    scores, peaks = torch.empty((2, batch, parts), dtype=torch.float32, device=logits.device).unbind(0)
    tokens, next_tokens = torch.empty((2, batch, parts), dtype=torch.int32, device=logits.device).unbind(0)
    checked = torch.empty((batch, parts, 3) if nucleus else (0,), dtype=torch.float32, device=logits.device)
    if batch == 0:
        return chosen
    options = {"PARTS": parts, "MIN_TEMPERATURE": MIN_TEMPERATURE, "NO_TOKEN": NO_TOKEN, **overlap(logits)}
    block_parts = triton.next_power_of_2(parts)
    draw = logits, temperature, seeds, positions
    found = scores, tokens, peaks
    size = vocabulary, logits.stride(0)
    mass = temperature if top_p is None else top_p
    _race[(parts, batch)](*draw, *found, *size, PART=PART, num_warps=8, **options)
    if nucleus:
        _check[(parts, batch)](
            *draw, mass, *found, checked, next_tokens, *size, BLOCK_PARTS=block_parts, PART=PART, num_warps=8, **options
        )
    _name_winner[(batch,)](
        *draw,
        mass,
        *found,
        checked,
        next_tokens,
        chosen,
        *size,
        BLOCK_PARTS=block_parts,
        BLOCK=BLOCK,
        NUCLEUS=nucleus,
        num_warps=16 if nucleus else 1,
        **options,
    )
    return chosen

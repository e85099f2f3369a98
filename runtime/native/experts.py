"""A layer's routed experts: the choice, the products, and the sum, alone or with other ranks in between.

Shape legend: T tokens, E logical experts, K choices per token, D model width, G ranks, N rows that are served from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear, silu

from kernels.combine import combine
from kernels.grouped_gemm import down, gate_up
from kernels.level_dispatch import level_slots
from kernels.permute import Permutation, permute
from kernels.route import Routes, route
from kernels.route_permute import route_permute
from runtime.native.families import DecoderShape
from runtime.native.weights import ExpertWeights, LayerWeights, MlpWeights

if TYPE_CHECKING:
    from runtime.native.forward import Decoder


class Choice(NamedTuple):
    """Which experts serve the rows of a layer.

    Attributes:
        routes: of all rows that this rank may have to serve, ``[N, K]``; with slots on this rank.
        permutation: of these rows' pairs.
        gpus: the rank that serves each pair of all ranks' rows, int32 ``[G, T, K]``, -1 in padding; None where all
            ranks have the same rows.
    """

    routes: Routes
    permutation: Permutation
    gpus: torch.Tensor | None = None


def moe_layer(
    decoder: Decoder,
    number: int,
    normed: torch.Tensor,
    logits: torch.Tensor,
    places: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice of experts, their products, and the exchange with the other ranks, whatever the mode.

    Args:
        decoder: the model.
        number: of the layer, which has experts.
        normed: hidden states ``[T, D]``.
        logits: of the router ``[T, E]``.
        places: integer ``[T]``, negative for padding.
        residual: ``[T, D]``.
        norm_weight: of the norm that follows ``[D]``.

    Returns:
        The new residual and its norm ``[T, D]``.
    """
    layer, ranks, eps = decoder.weights.layers[number], decoder.ranks, decoder.shape.eps
    assert layer.experts is not None
    if ranks is None:
        choice, rows = choose_among_all(decoder, number, logits), normed
    else:
        choice = ranks.choose(decoder, number, logits, places)
        rows = ranks.send(normed, choice)
    if decoder.load is not None:
        decoder.load.note(choice.routes.slots)
    if decoder.kept_routes is not None:
        decoder.kept_routes.append(choice.routes)
    pairs = run_experts(decoder.shape, layer.experts, rows, choice.permutation)
    shared = shared_expert(normed, layer)
    if ranks is None:
        return combine(pairs, choice.routes, shared, residual, norm_weight, eps)
    return ranks.finish_experts(pairs, choice, shared, residual, norm_weight, eps)


def choose_among_all(decoder: Decoder, number: int, logits: torch.Tensor) -> Choice:
    """The choice where this rank has every row."""
    experts = decoder.weights.layers[number].experts
    assert experts is not None
    routes, permutation = choose_experts(decoder.shape, experts, logits)
    if decoder.replace_routes is not None:
        routes, permutation = decoder.replace_routes(number, routes, permutation)
    return Choice(routes, permutation)


def choose_experts(shape: DecoderShape, experts: ExpertWeights, logits: torch.Tensor) -> tuple[Routes, Permutation]:
    """The experts that the router's logits ``[T, E]`` choose, and the pairs of every slot."""
    scoring = scoring_of(shape, experts)
    if experts.dispatch is None:
        return route_permute(logits, len(experts.gate_up), slot_of_expert=experts.slot_of_expert, **scoring)
    ids, _, weights = route(logits, **scoring)
    slots = level_slots(ids, experts.dispatch)
    return Routes(ids, slots, weights), permute(slots, len(experts.gate_up))


def scoring_of(shape: DecoderShape, experts: ExpertWeights) -> dict[str, Any]:
    """How a layer's router chooses, as `kernels.route` names it."""
    routing = shape.routing
    return {
        "top_k": shape.top_k,
        "scoring": routing.scoring,
        "renormalise": shape.renormalise,
        "scale": routing.scale,
        "bias": experts.correction,
        "num_groups": routing.num_groups,
        "top_groups": routing.top_groups,
        "group_score": routing.group_score,
    }


def run_experts(
    shape: DecoderShape, experts: ExpertWeights, rows: torch.Tensor, permutation: Permutation
) -> torch.Tensor:
    """Outputs of this rank's slots for every pair, not yet weighted, ``[N·K, D]``; undefined for other ranks' pairs."""
    if not len(experts.gate_up):
        return rows.new_empty((len(rows) * shape.top_k, shape.width))
    inner = gate_up(rows, experts.gate_up, permutation, shape.top_k, shape.activation, experts.gate_up_bias)
    return down(inner, experts.down, permutation, experts.down_bias)


def shared_expert(normed: torch.Tensor, layer: LayerWeights) -> torch.Tensor | None:
    """Output of the expert that serves every token, weighed by its gate, ``[T, D]``; None where there is none."""
    if layer.mlp is None:
        return None
    output = gated_mlp(normed, layer.mlp)
    return output if layer.shared_gate is None else output * torch.sigmoid(linear(normed, layer.shared_gate))


def gated_mlp(normed: torch.Tensor, mlp: MlpWeights) -> torch.Tensor:
    """A SiLU-gated MLP, ``[T, D]``."""
    gate, up = linear(normed, mlp.gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, mlp.down)

"""Migration: executed step by step, the moves keep every expert served and every GPU within its slots."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import PlanError
from placement.migration import Move, align_to, moves_document, num_moves, plan_moves
from placement.slots import check_slots, sorted_slots


def random_layer(rng, num_experts, slots_per_gpu, fill):
    """Every expert somewhere; then further copies, each with this probability."""
    gpus = [[] for _ in slots_per_gpu]
    places = [gpu for gpu, slots in enumerate(slots_per_gpu) for _ in range(slots)]
    for expert, gpu in enumerate(rng.permutation(places)[:num_experts]):
        gpus[gpu].append(expert)
    for gpu, held in enumerate(gpus):
        others = [expert for expert in range(num_experts) if expert not in held]
        extra = min(slots_per_gpu[gpu] - len(held), len(others), rng.binomial(slots_per_gpu[gpu], fill))
        held += rng.choice(others, extra, replace=False).tolist() if extra else []
    return gpus


def random_slots(seed, num_layers, num_experts, slots_per_gpu, fill=0.5):
    rng = np.random.default_rng(seed)
    return sorted_slots([random_layer(rng, num_experts, slots_per_gpu, fill) for _ in range(num_layers)])


@st.composite
def migrations(draw):
    """An old and a new placement with copies, uneven GPUs (some without a slot), and GPUs per node."""
    num_experts = draw(st.integers(1, 10))
    slots = draw(st.lists(st.integers(0, num_experts), min_size=1, max_size=6))
    slots[draw(st.integers(0, len(slots) - 1))] += max(0, num_experts - sum(slots))
    slots = [min(count, num_experts) for count in slots]
    if sum(slots) < num_experts:
        slots[0] = num_experts
    per_node = draw(st.sampled_from([size for size in range(1, len(slots) + 1) if len(slots) % size == 0]))
    fills = st.sampled_from([0.0, 0.2, 1.0])
    seeds = st.integers(0, 10**6)
    old = random_slots(draw(seeds), 2, num_experts, slots, draw(fills))
    new = random_slots(draw(seeds), 2, num_experts, slots, draw(fills))
    return old, new, num_experts, per_node


def execute(old, new, moves, num_experts):
    """Follow the moves with one spare buffer per GPU, checking every state on the way."""
    state = [[set(held) for held in layer] for layer in old]
    most = [[max(len(a), len(b)) for a, b in zip(*layers, strict=True)] for layers in zip(old, new, strict=True)]
    waiting = {}
    assert [move.layer for move in moves] == sorted(move.layer for move in moves)
    for index, move in enumerate(moves):
        gpus = state[move.layer]
        assert move.expert in gpus[move.source_gpu]
        assert move.expert not in gpus[move.target_gpu]
        assert move.expert in new[move.layer][move.target_gpu]
        if move.replaces is not None:
            assert move.replaces in gpus[move.target_gpu]
            assert move.replaces not in new[move.layer][move.target_gpu]
        if move.staged:
            assert not waiting
            waiting[move.target_gpu] = move
        else:
            gpus[move.target_gpu].discard(move.replaces)
            gpus[move.target_gpu].add(move.expert)
        for staged in [staged for staged in waiting.values() if staged.replaces == move.expert]:
            gpus[staged.target_gpu].remove(staged.replaces)
            gpus[staged.target_gpu].add(staged.expert)
            del waiting[staged.target_gpu]
        in_buffers = {staged.expert for staged in waiting.values()}
        assert in_buffers.union(*gpus) == set(range(num_experts))
        assert all(len(held) <= slots for held, slots in zip(gpus, most[move.layer], strict=True))
        if index + 1 == len(moves) or moves[index + 1].layer > move.layer:
            assert not waiting
    dropped = [
        [held & set(listed) for held, listed in zip(*pair, strict=True)] for pair in zip(state, new, strict=True)
    ]
    assert sorted_slots([[sorted(held) for held in layer] for layer in dropped]) == new


@settings(max_examples=300, deadline=None)
@given(migrations())
def test_every_step_is_valid_and_ends_at_the_new_plan(migration):
    old, new, num_experts, per_node = migration
    moves = plan_moves(old, new, per_node)
    execute(old, new, moves, num_experts)
    assert len(moves) == num_moves(old, new)
    copies = {(move.layer, move.expert, move.target_gpu) for move in moves}
    assert len(copies) == len(moves)
    assert plan_moves(new, new, per_node) == []


def test_a_source_on_the_same_node_comes_first_and_sources_share_the_work():
    old = (((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), ()),)
    new = (((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),)
    assert [move.source_gpu for move in plan_moves(old, new, gpus_per_node=2)] == [2, 2, 2, 2]
    assert sorted(move.source_gpu for move in plan_moves(old, new)) == [0, 0, 1, 2]


def test_chains_run_from_their_end_and_only_cycles_are_staged():
    # 0 goes to GPU 1 and 1 to GPU 2, which drops its copy of 3.
    chain = plan_moves((((0, 3), (1, 4), (2, 3)),), (((3,), (0, 4), (1, 2)),))
    assert chain == [Move(0, 1, 1, 2, 3), Move(0, 0, 0, 1, 1)]
    cycle = plan_moves((((0,), (1,), (2,)),), (((2,), (0,), (1,)),))
    assert [(move.expert, move.replaces, move.staged) for move in cycle] == [
        (2, 0, True),
        (1, 2, False),
        (0, 1, False),
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_equal_plans_without_copies_need_one_staged_move_per_connected_part(seed, num_gpus):
    slots = [2] * num_gpus
    old, new = (random_slots(seed + offset, 1, 2 * num_gpus, slots, 0.0) for offset in (0, 1))
    moves = plan_moves(old, new)
    parts = {gpu: {gpu} for move in moves for gpu in (move.source_gpu, move.target_gpu)}
    for move in moves:
        union = parts[move.source_gpu] | parts[move.target_gpu]
        for gpu in union:
            parts[gpu] = union
    assert sum(move.staged for move in moves) == len({frozenset(part) for part in parts.values()})


def least_moves(old, new, per_node, per_layer):
    """Brute force over all names that keep nodes whole and numbers of slots equal."""
    num_gpus = len(new[0])
    fullest = [max(len(layer[gpu]) for layer in new) for gpu in range(num_gpus)]
    allowed = [
        order
        for order in permutations(range(num_gpus))
        if all(fullest[gpu] == fullest[order[gpu]] for gpu in range(num_gpus))
        and all(order[g] // per_node == order[g - g % per_node] // per_node for g in range(num_gpus))
    ]
    if per_layer:
        pairs = list(zip(old, new, strict=True))
        return sum(min(num_moves((a,), (tuple(b[g] for g in order),)) for order in allowed) for a, b in pairs)
    return min(num_moves(old, tuple(tuple(layer[g] for g in order) for layer in new)) for order in allowed)


@settings(max_examples=80, deadline=None)
@given(migrations(), st.booleans())
def test_names_of_gpus_are_chosen_for_the_fewest_moves(migration, per_layer):
    old, new, num_experts, per_node = migration
    aligned = align_to(old, new, per_node, per_layer)
    check_slots(aligned, num_experts, range(len(new)))
    assert num_moves(old, aligned) == least_moves(old, new, per_node, per_layer)
    for gpu in range(len(new[0])):
        assert max(len(layer[gpu]) for layer in aligned) <= max(len(layer[gpu]) for layer in new)


def test_a_renamed_plan_needs_no_moves():
    old = random_slots(0, 3, 12, [4] * 4)
    swapped = tuple(tuple(layer[gpu] for gpu in (3, 2, 0, 1)) for layer in old)
    assert num_moves(old, swapped) > 0
    assert align_to(old, swapped, gpus_per_node=2) == old


def test_document_of_moves():
    moves = plan_moves((((0,), (1,)),), (((1,), (0,)),))
    assert moves_document(moves, expert_bytes=100) == {
        "num_moves": 2,
        "bytes": 200,
        "moves": [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
        "staged": [0],
    }
    assert moves_document([]) == {"num_moves": 0, "moves": [], "staged": []}


@pytest.mark.parametrize(
    ("old", "new", "per_node", "message"),
    [
        ((((0,), (1,)),), (((0,), (1,)),) * 2, None, "different layers"),
        ((((0,), (1,)),), (((0, 1),),), None, "different GPUs"),
        ((((0,), (1,)),), (((0,), (2,)),), None, "different experts"),
        ((((0,), (1,)),), (((1,), (0,)),), 3, "gpus_per_node 3: expected a divisor of 2"),
        ((((0,), (1,)),), (((1,), (0,)),), 0, "gpus_per_node 0"),
    ],
)
def test_plans_that_do_not_belong_together_are_refused(old, new, per_node, message):
    for function in (plan_moves, align_to):
        with pytest.raises(PlanError, match=message) as caught:
            function(old, new, per_node)
        assert "\n" not in str(caught.value)

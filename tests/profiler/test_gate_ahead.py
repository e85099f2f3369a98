"""What the next layer's gate would choose one layer early, against the gates themselves and where the answer is known.

The reference hooks the gates' inputs while a loop of its own runs one prompt at a time, and then calls the next gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from profiler.errors import ModelError
from profiler.gate_ahead import GateAhead
from profiler.recorder import SequenceRoutes, record_routes
from profiler.seam import find_moe_layers
from tests.support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model

PROMPTS = [np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist() for length in (7, 1, 4)]
NEW_TOKENS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(model: Any, gate_ahead: bool = True, **settings: Any) -> list[SequenceRoutes]:
    sizes = {"batch_size": 2, "max_new_tokens": NEW_TOKENS} | settings
    return list(record_routes(model, PROMPTS, gate_ahead=gate_ahead, **sizes))


def assert_same_routes(left: list[SequenceRoutes], right: list[SequenceRoutes]) -> None:
    for a, b in zip(left, right, strict=True):
        for name in ("experts", "weights", "token_ids", "decode"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def gates_of(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Every MoE layer's gate, and the module that it is a part of."""
    blocks = [model.get_submodule(layer.name.rpartition(".")[0]) for layer in find_moe_layers(model)]
    return [(getattr(block, "gate", None) or block.router, block) for block in blocks]


@contextmanager
def inputs_of(gates: list[torch.nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """First argument of every call, per gate."""
    inputs: list[list[torch.Tensor]] = [[] for _ in gates]
    handles = [
        gate.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0].clone()))
        for gate, kept in zip(gates, inputs, strict=True)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def choose(family: str, gate: torch.nn.Module, block: Any, x: torch.Tensor, num_experts: int, top_k: int) -> Any:
    """A family's choice ``[N, K]`` for gate inputs, sorted by falling weight."""
    if family == "lfm2_moe":
        output = gate(x, block.expert_bias)
    else:
        output = gate(x)
        if family == "dbrx":
            output = block.route_tokens_to_experts(output)
    parts = [part.reshape(-1, part.shape[-1]) for part in (output if isinstance(output, tuple) else (output,))]
    if family == "jamba":  # softmax of the logits and nothing else; some releases return no more
        [logits] = [part for part in parts if part.shape[1] == num_experts]
        return logits.topk(top_k, dim=1).indices
    [indices] = [part for part in parts if not part.dtype.is_floating_point]
    weights = next(part for part in parts if part.dtype.is_floating_point and part.shape == indices.shape)
    return indices.gather(1, weights.float().sort(dim=1, descending=True, stable=True).indices)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_equals_its_next_gate_called_directly(family: str) -> None:
    model = tiny_model(family)
    layer = find_moe_layers(model)[0]
    gates = gates_of(model)
    plain, records = record(model, gate_ahead=False), record(model)
    assert_same_routes(records, plain)
    assert all(routes.gate_ahead is None for routes in plain)
    misses = 0
    for routes in records:
        with inputs_of([gate for gate, _ in gates]) as inputs:
            output = model(torch.tensor([routes.token_ids[~routes.decode].tolist()]), use_cache=True)
            for token in routes.token_ids[routes.decode].tolist():
                output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        for index, (gate, block) in enumerate(gates[1:]):
            chosen = [choose(family, gate, block, x, layer.num_experts, layer.top_k) for x in inputs[index]]
            np.testing.assert_array_equal(routes.gate_ahead[:, index], torch.cat(chosen))
        assert routes.gate_ahead.shape[1:] == (len(gates) - 1, layer.top_k)
        misses += (routes.gate_ahead != routes.experts[:, 1:]).sum()
    assert misses, "the choice one layer early is the choice itself"


def test_families_without_a_block_around_the_experts() -> None:
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, enable_moe_block=True,
        num_experts=8, top_k_experts=2, moe_intermediate_size=24, layer_types=["full_attention"] * 3,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=VOCAB_SIZE, num_kv_shared_layers=0,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.5 if ".router." in name else 0.15)
            elif name.endswith(("router.scale", "router.per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
    records = record(model)
    assert_same_routes(records, record(model, gate_ahead=False))
    gates = [gate for gate, _ in gates_of(model)]
    for routes in records:
        with inputs_of(gates) as inputs, torch.no_grad():
            model(torch.tensor([routes.token_ids.tolist()]))
        for index, gate in enumerate(gates[1:]):
            [x] = inputs[index]
            x = x / (x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt() * gate.scale / 32**0.5
            kept = (x @ gate.proj.weight.T).topk(2, dim=-1)
            weights = kept.values.softmax(dim=-1) * gate.per_expert_scale[kept.indices]
            expected = kept.indices.gather(1, weights.argsort(dim=1, descending=True))
            np.testing.assert_array_equal(routes.gate_ahead[:, index], expected)


def constructed_model(identity: bool) -> Any:
    """Layers that share one gate and one norm; if ``identity``, attention and experts add nothing to their input."""
    model = tiny_model("mixtral")
    first = model.model.layers[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.load_state_dict(first.mlp.gate.state_dict())
            layer.post_attention_layernorm.load_state_dict(first.post_attention_layernorm.state_dict())
            if identity:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.experts.down_proj.zero_()
    return model


def hit_rate(records: list[SequenceRoutes]) -> float:
    ahead = np.concatenate([routes.gate_ahead for routes in records])
    real = np.concatenate([routes.experts[:, 1:] for routes in records])
    return float((ahead[..., :, None] == real[..., None, :]).any(-1).mean())


def test_layers_that_see_the_same_input_are_predicted_perfectly() -> None:
    assert hit_rate(record(constructed_model(identity=True))) == 1.0
    assert hit_rate(record(constructed_model(identity=False))) < 1.0
    # Gates that rank the experts in opposite orders: each predicts itself, not its neighbour.
    model = constructed_model(identity=True)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.neg_()
    records = record(model)
    assert hit_rate(records) == 1.0
    assert all((routes.gate_ahead[:, 0] != routes.gate_ahead[:, 1]).all() for routes in records)


def test_routed_experts_are_never_computed_for_a_question() -> None:
    model = tiny_model("qwen2_moe")
    layers = find_moe_layers(model)
    computed: list[str] = []
    for layer in layers:
        layer.experts.register_forward_hook(lambda module, args, output, name=layer.name: computed.append(name))
    with GateAhead(model, layers) as ahead, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert computed == [layer.name for layer in layers]
    assert ahead.take(1, 3).shape == (1, 3, 2, 2)


def test_hooks_are_gone_even_when_recording_is_abandoned() -> None:
    model = tiny_model("mixtral")
    routes = record_routes(model, PROMPTS, batch_size=1, max_new_tokens=2, gate_ahead=True)
    next(routes)
    routes.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_whose_gates_cannot_be_asked_are_refused() -> None:
    config = tiny_config("mixtral")
    config.num_hidden_layers = 1
    with pytest.raises(ModelError, match=r"one MoE layer .*, expected two or more.*; leave gate_ahead out"):
        record(AutoModelForCausalLM.from_config(config).eval())

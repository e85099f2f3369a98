"""Bringing a plan to life: ranks, shards and the engine, from a plan file and settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from placement.plan import PlacementPlan
from profiler.fingerprint import model_fingerprint
from runtime.checkpoint import load_shard
from runtime.distributed import FailedElsewhereError, RankAddress, RankGroup, choose_backend, choose_device
from runtime.engine import Engine
from runtime.errors import InputError, ModelError, one_line
from runtime.exchange import EXCHANGES
from runtime.launcher import LocalRanks
from runtime.native.families import NotNativeError, read_shape
from runtime.native.loading import choose_native, load_native
from runtime.random_weights import random_shard
from runtime.settings import EngineSettings
from runtime.worker import RankWorker, local_slots
from runtime.worker_interface import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Run:
    """One rank of a run, ready to work.

    Attributes:
        plan: the placement plan.
        model_path: directory or hub id of the model that was loaded.
        group: all ranks.
        worker: this rank's.
        ranks: the local ranks this process started, None where it was started as a rank itself.
    """

    plan: PlacementPlan
    model_path: str
    group: RankGroup
    worker: Worker
    ranks: LocalRanks | None

    def start_engine(self, settings: EngineSettings) -> Engine:
        """The engine of rank 0 (not yet running)."""
        facts = self.worker.facts
        return Engine(self.worker, settings, facts.eos_token_ids, facts.max_context)

    def close(self) -> None:
        """End the ranks; they must have been told to stop, or are killed."""
        if self.ranks is not None:
            self.ranks.wait(timeout_s=10)
        self.group.close()


def load_plan(path: str, settings: EngineSettings) -> tuple[PlacementPlan, str]:
    """Read the plan and check it against the model's configuration before anything is started.

    Returns:
        The plan, and the model's directory or hub id.

    Raises:
        PlanError: the plan is malformed or was made for another model.
        ModelError: the model or the exchange mode cannot be served.
    """
    plan = PlacementPlan.load(path)
    model = settings.model or plan.resolve_model(path)
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1):
        raise ModelError(f"model {model}: no such directory; give model=DIRECTORY with config.json and safetensors")
    exchange = settings.exchange or plan.workload.exchange
    if exchange not in EXCHANGES:
        raise ModelError(f"exchange {exchange}: this version serves {' and '.join(EXCHANGES)}; give exchange=allreduce")
    if plan.dispatch.rule != "level" and exchange != "allreduce":  # without homes, the rules are one
        raise ModelError(
            f"dispatch rule {plan.dispatch.rule}: this version serves level; solve with dispatch.rule=level, or give "
            "exchange=allreduce"
        )
    if os.environ.get("RANK", "0") == "0":  # what rank 0 finds holds for all, and takes seconds
        fingerprint = model_fingerprint(model) if plan.model_fingerprint else None
        layer_ids, num_experts, top_k = _moe_shape(model)
        plan.check_model(num_experts, top_k, layer_ids, fingerprint)
    return plan, model


def _moe_shape(model: str) -> tuple[list[int], int, int]:
    """MoE layers, experts and choices per token of a model, from its configuration alone."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from profiler.seam import find_moe_layers

    try:
        config = AutoConfig.from_pretrained(model)
        if torch.cuda.is_available():  # the native path may do without the modelling code, whose import takes seconds
            with suppress(NotNativeError):
                shape = read_shape(config)
                return (
                    [layer for layer, routed in enumerate(shape.moe_layers) if routed],
                    shape.num_experts,
                    shape.top_k,
                )
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise ModelError(
            f"model {model}: no usable config.json ({one_line(error)}); copy or download it again"
        ) from error
    layers = find_moe_layers(skeleton)
    return [layer.layer_id for layer in layers], layers[0].num_experts, layers[0].top_k


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    remedy = "give a model with tokenizer.json, or copy the tokenizer of the model it was made from"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"model {model}: no usable tokenizer ({one_line(error)}); {remedy}") from error
    # Where its files are missing, Transformers makes an empty one of the family's class.
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"model {model}: its tokenizer knows no text; {remedy}")
    return tokenizer


def start_run(plan: PlacementPlan, model: str, settings: EngineSettings) -> Run:
    """Start or join the ranks and load this rank's shard.

    Without torchrun's variables this process becomes rank 0 and starts the others on this host.
    """
    ranks = None
    address = RankAddress.from_environment()
    if address is None:
        ranks = LocalRanks(plan.num_gpus)
        address = ranks.address
    if address.world_size != plan.num_gpus:
        raise ModelError(
            f"{address.world_size} ranks were started, the plan is for {plan.num_gpus} GPUs: start as many"
        )
    with joined_group(ranks, address, settings) as group:
        if address.rank == 0:
            gpus = torch.cuda.device_count()
            if settings.device == "auto" and 0 < gpus < address.local_world_size:
                logger.warning("%d GPUs for %d ranks: the CPU is used instead", gpus, address.local_world_size)
            where = f"{address.world_size} ranks on {group.device.type} over {group.backend}"
            logger.info("%s, exchange %s, model %s", where, settings.exchange or plan.workload.exchange, model)
        worker = load_together(plan, model, settings, group)
        group.end_start_up()
        return Run(plan, model, group, worker, ranks)


@contextmanager
def joined_group(ranks: LocalRanks | None, address: RankAddress, settings: EngineSettings) -> Iterator[RankGroup]:
    """Meet the other ranks; on an error those of this process are ended first, so that their end is no news to it."""
    group = None
    try:
        group = join_group(address, settings)
        yield group
    except BaseException as error:
        if ranks is not None:
            ranks.kill()
        if group is not None and isinstance(error, (InputError, SystemExit)):  # else a GPU may wait for lost ranks
            group.close()
        raise


def join_group(address: RankAddress, settings: EngineSettings) -> RankGroup:
    """Choose this rank's device and meet the other ranks."""
    device = choose_device(settings.device, address)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # else the user has said how many
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // address.local_world_size))
    return RankGroup(address, device, choose_backend(device, address), settings.rank_timeout_s)


def load_together(plan: PlacementPlan, model: str, settings: EngineSettings, group: RankGroup) -> Worker:
    """Load every rank's shard; see `on_all_ranks`."""
    return on_all_ranks(group, model, lambda: load_worker(plan, model, settings, group))


def on_all_ranks(group: RankGroup, model: str, work: Callable[[], T]) -> T:
    """This rank's result of work that may fail; where any rank fails, all stop, and rank 0 alone says why.

    Raises:
        ModelError: on rank 0, what the first rank that failed has found.
        SystemExit: on the other ranks.
    """
    result, found = None, ""
    try:
        result = work()
    except InputError as error:
        found = str(error)
    except FailedElsewhereError:
        pass  # that rank tells
    except torch.OutOfMemoryError:
        remedy = "plan for more GPUs or fewer slots, or lower cache_tokens"
        found = f"model {model}: this rank's part does not fit into {group.device}; {remedy}"
    errors = group.gather_text(found)
    failed = [rank for rank, text in enumerate(errors) if text]
    if result is not None and not failed:
        return result
    if group.rank != 0:
        raise SystemExit(2)
    where = "" if len(failed) == len(errors) else f"rank {failed[0]}: "
    raise ModelError(where + errors[failed[0]])


def load_worker(plan: PlacementPlan, model: str, settings: EngineSettings, group: RankGroup) -> Worker:
    """Load this rank's shard of the model, on the native path or the universal one, and put it to work in the group."""
    exchange = settings.exchange or plan.workload.exchange
    with group.together():
        shape = choose_native(model, settings, group, exchange)
    if shape is not None:
        return load_native(plan, model, shape, settings, group)
    load: Any = random_shard if settings.weights == "random" else load_shard
    shard, report = load(model, local_slots(plan, group.rank), settings.torch_dtype(group.device), group.device)
    return RankWorker(shard, report, plan, group, exchange)

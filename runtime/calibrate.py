"""`python -m runtime calibrate`: measures this host for a model's shape and writes the cluster file of `placement`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import yaml

from placement.atomic import write_atomically
from placement.cluster import Cluster, Coefficient, Coefficients, Link
from profiler.errors import InputError
from profiler.seam import find_moe_layers
from profiler.trace_header import require_output
from runtime.calibration.experts import ExpertShape, ExpertTime, time_experts
from runtime.calibration.fit import Fit, fit, fit_link
from runtime.calibration.links import ExchangeTime, time_exchange
from runtime.calibration.timing import time_calls_us
from runtime.distributed import RankAddress, RankGroup
from runtime.errors import ModelError
from runtime.launcher import LocalRanks
from runtime.native.loading import load_config
from runtime.settings import EngineSettings, Settings
from runtime.start import joined_group, on_all_ranks

COPY_BYTES = 1 << 28
MATRIX = {"cuda": 8192, "cpu": 512}  # rows and columns of the product that tells the arithmetic rate
ASSUMED_NETWORK = Link(2e-5, 5e10)  # between nodes, which one host cannot measure
USABLE_SHARE = 0.9  # of a GPU's memory


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """What is measured.

    Attributes:
        model: directory or hub id, of which only the configuration is read.
        gpus: ranks of this host; None takes every GPU, or one CPU rank.
        name: of the cluster, in tables.
        kv_reserve_bytes: of every GPU, that experts may not take.
    """

    model: str
    gpus: int | None = None
    name: str = "measured"
    kv_reserve_bytes: int = 0

    def __post_init__(self) -> None:
        if self.gpus is not None and (type(self.gpus) is not int or self.gpus < 1):
            raise InputError(f"gpus={self.gpus}: expected an integer of at least 1")
        if type(self.kv_reserve_bytes) is not int or self.kv_reserve_bytes < 0:
            raise InputError(f"kv_reserve_bytes={self.kv_reserve_bytes}: expected a number of bytes of at least 0")


@dataclass(frozen=True)
class ModelSizes:
    """What a configuration tells: its experts, and the bytes of an expert, a hidden state and all other weights."""

    expert: ExpertShape
    expert_bytes: int
    hidden_state_bytes: int
    other_bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Rates:
    """What a rank's device does per second, and the memory it has for experts."""

    copy_bytes_per_s: float
    flop_per_s: float
    expert_memory_bytes: float


def calibrate(settings: CalibrationSettings, engine: EngineSettings, output: str) -> int:
    """Measure on all ranks and write the cluster file; returns the exit code."""
    require_output(Path(output), [])
    ranks, address = None, RankAddress.from_environment()
    if address is None:
        ranks = LocalRanks(settings.gpus or max(1, torch.cuda.device_count()))
        address = ranks.address
    if address.world_size != address.local_world_size:
        raise ModelError(f"{address.world_size} ranks on several hosts: calibrate measures one; start it on each alone")
    with joined_group(ranks, address, engine) as group:
        dtype = engine.torch_dtype(group.device)
        told = torch.bfloat16 if dtype == "auto" else cast(torch.dtype, dtype)
        sizes, memory_bytes = on_all_ranks(group, settings.model, lambda: find_sizes(settings, told, group))
        group.end_start_up()
        experts, exchanges, rates = measure(group, sizes, memory_bytes)
        if group.rank == 0:
            cluster, fits = describe(settings, sizes, experts, exchanges, rates, group.world_size)
            write_cluster(Path(output), cluster, fits, group.device)
    if ranks is not None:
        ranks.wait(timeout_s=10)
    group.close()
    return 0


def find_sizes(settings: CalibrationSettings, dtype: torch.dtype, group: RankGroup) -> tuple[ModelSizes, float]:
    """What is known before anything is measured: the model's sizes, and this rank's memory for experts.

    Raises:
        ModelError: as in `model_sizes` and `expert_memory_bytes`.
    """
    sizes = model_sizes(settings.model, dtype, group)
    return sizes, expert_memory_bytes(group, sizes, settings)


def model_sizes(model: str, dtype: torch.dtype, group: RankGroup) -> ModelSizes:
    """Read a model's sizes from its configuration, each GPU having an even share of the experts.

    Raises:
        ModelError: there is no usable configuration, or no MoE layer in it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layer = find_moe_layers(skeleton)[0]
    width = int(config.get_text_config().hidden_size)
    weights = [parameter for parameter in layer.experts.parameters() if parameter.ndim == 3]
    inner = sum(weight.numel() for weight in weights) // layer.num_experts // (3 * width)
    shape = ExpertShape(
        slots=-(-layer.num_experts // group.world_size),
        top_k=layer.top_k,
        width=width,
        inner=inner,
        biased=any(parameter.ndim == 2 for parameter in layer.experts.parameters()),
        activation="gpt_oss" if config.model_type == "gpt_oss" else "silu",
    )
    everything = sum(parameter.nbytes for parameter in skeleton.parameters())
    routed = sum(found.expert_bytes * found.num_experts for found in find_moe_layers(skeleton))
    return ModelSizes(shape, layer.expert_bytes, width * dtype.itemsize, everything - routed, dtype)


@torch.inference_mode()
def measure(
    group: RankGroup, sizes: ModelSizes, memory_bytes: float
) -> tuple[list[ExpertTime], list[ExchangeTime], Rates]:
    """Measure on every rank; the slowest rank's figures, the same on all ranks."""
    device, dtype = group.device, sizes.dtype
    experts = time_experts(sizes.expert, dtype, device)
    exchanges = time_exchange(group, sizes.expert.width, dtype) if group.world_size > 1 else []
    times = slowest(group, [*(-time.us for time in experts), *(-time.us for time in exchanges)])
    experts = [replace(time, us=-us) for time, us in zip(experts, times, strict=False)]
    exchanges = [replace(time, us=-us) for time, us in zip(exchanges, times[len(experts) :], strict=True)]
    found = [copy_bytes_per_s(device), flop_per_s(device, dtype), memory_bytes]
    return experts, exchanges, Rates(*slowest(group, found))


def slowest(group: RankGroup, numbers: Sequence[float]) -> list[float]:
    """The least of every rank's number, one by one."""
    gathered = group.gather_tokens(torch.tensor(numbers, dtype=torch.float64).view(torch.int64))
    least: list[float] = gathered.view(torch.float64).amin(dim=0).tolist()
    return least


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / time_calls_us([lambda: target.copy_(source)], device)


def flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product of random matrices."""
    size = MATRIX[device.type]
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2e6 * size**3 / time_calls_us([lambda: left @ right], device)


def expert_memory_bytes(group: RankGroup, sizes: ModelSizes, settings: CalibrationSettings) -> float:
    """What routed experts may take of this rank's memory, after all other weights and the reserve.

    Raises:
        ModelError: nothing is left.
    """
    if group.device.type == "cuda":
        total = torch.cuda.get_device_properties(group.device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // group.world_size
    left = USABLE_SHARE * total - sizes.other_bytes - settings.kv_reserve_bytes
    if left <= 0:
        raise ModelError(
            f"{total / 1e9:.1f} GB per rank: {sizes.other_bytes / 1e9:.1f} GB of other weights and kv_reserve_bytes="
            f"{settings.kv_reserve_bytes} leave nothing for experts; lower the reserve"
        )
    return left


def describe(
    settings: CalibrationSettings,
    sizes: ModelSizes,
    experts: Sequence[ExpertTime],
    exchanges: Sequence[ExchangeTime],
    rates: Rates,
    num_gpus: int,
) -> tuple[Cluster, dict[str, Fit]]:
    """The cluster of these measurements, and how well its coefficients tell them."""
    fits = {"experts": fit([[1, time.active, time.pairs] for time in experts], [time.us for time in experts])}
    coefficients = [Coefficient(value, "measured") for value in fits["experts"].values]
    same_gpu = link = Link(0.0, rates.copy_bytes_per_s)
    if exchanges:
        link, fits["exchange"] = fit_link([time.carried_bytes for time in exchanges], [time.us for time in exchanges])
    return (
        Cluster(
            name=settings.name,
            nodes=1,
            gpus_per_node=num_gpus,
            expert_memory_bytes=(rates.expert_memory_bytes,) * num_gpus,
            hbm_bytes_per_s=rates.copy_bytes_per_s,
            flop_per_s=rates.flop_per_s,
            launch_us=coefficients[0].value,
            same_gpu=same_gpu,
            intra_node=link,
            inter_node=ASSUMED_NETWORK,
            coefficients=(Coefficients(sizes.expert_bytes, sizes.hidden_state_bytes, *coefficients),),
        ),
        fits,
    )


def write_cluster(output: Path, cluster: Cluster, fits: dict[str, Fit], device: torch.device) -> None:
    """Write the file with a head that says what is measured and how well it fits, and print the same."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    told = [
        f"{what}: the model tells the measured times within {100 * found.median_error:.1f}% (median), "
        f"{100 * found.max_error:.1f}% (at most)"
        for what, found in fits.items()
    ]
    head = [
        f"Measured by `python -m runtime calibrate` on {cluster.num_gpus} x {name}, torch {torch.__version__}.",
        "Assumed: inter_node. hbm_bytes_per_s is a copy's, flop_per_s a matrix product's.",
        *told,
    ]
    document = cluster.to_dict() | {"expert_memory_bytes": list(cluster.expert_memory_bytes)}
    document["coefficients"] = [dict(entry) for entry in document["coefficients"]]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(document, sort_keys=False)
    write_atomically(output, text)
    c0, c1, c2 = (f"{getattr(cluster.coefficients[0], c).value:.4g}" for c in ("c0_us", "c1_us", "c2_us"))
    print(f"one MoE layer on one GPU: {c0} us + {c1} us per active expert + {c2} us per token-expert pair")
    link = cluster.intra_node
    print(f"exchange: {1e6 * link.latency_s:.1f} us + bytes / {link.bytes_per_s / 1e9:.1f} GB/s")
    print("\n".join(told))

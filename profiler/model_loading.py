"""Loads a model and its tokenizer for recording, with every failure told in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from profiler.errors import InputError, ModelError
from profiler.fingerprint import find_config
from profiler.seam import MoELayer, find_moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    find_config(model)
    with _one_line_errors(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(model, local_files_only=os.path.isdir(model), trust_remote_code=False)


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a local folder or a hub id.

    Raises:
        ModelError: there is none, or Transformers does not know the model.
    """
    from transformers import AutoConfig

    find_config(model)
    with _one_line_errors(model, "configuration"):
        return AutoConfig.from_pretrained(model, local_files_only=os.path.isdir(model), trust_remote_code=False)


def find_layers_without_weights(model: str, config: PreTrainedConfig) -> list[MoELayer]:
    """The MoE layers that a configuration describes, on meta tensors: tells a wrong model before its weights load.

    Raises:
        ModelError: the model cannot be built, or has no MoE layers.
    """
    from transformers import AutoModelForCausalLM

    with _one_line_errors(model, "configuration"), torch.device("meta"):
        return find_moe_layers(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def load_model(model: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; a local folder is loaded without touching the network.

    Args:
        model: a local folder or a hub id.
        dtype: ``auto`` (as saved) or the name of a torch dtype.
        device: where to put it.

    Raises:
        ModelError: it is missing or unreadable, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    find_config(model)
    with _one_line_errors(model, "weights"), _without_load_report():
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=os.path.isdir(model),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below; Transformers refers to a report above its error
        )
        missing = sorted(report["missing_keys"])
        if missing:
            # Transformers would fill them with random values and go on.
            raise ModelError(f"{model}: lacks {len(missing)} weights such as {missing[0]}; copy the model again")
        mismatched = sorted(name for name, *_ in report["mismatched_keys"])
        if mismatched:
            raise ModelError(
                f"{model}: {len(mismatched)} weights such as {mismatched[0]} have another shape than config.json says; "
                "copy the model again"
            )
        return loaded.to(device).eval()


def choose_device(device: str) -> torch.device:
    """The device that a setting names; ``auto`` takes a GPU where there is one.

    Raises:
        InputError: the machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={device}: this machine has {torch.cuda.device_count()} GPUs; use device=cpu or auto")
    return chosen


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Positions that a model's configuration allows, or None where it sets no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Transformers logs a table of missing and superfluous weights; the missing ones are an error here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _one_line_errors(model: str, part: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    # What Transformers raises for missing files, unknown families, settings that make no sense, missing packages, and
    # damaged or wrong weights.
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{model}: its {part} cannot be loaded ({reason[:200]}); give a whole Hugging Face model"
        ) from error

"""The fingerprint of a model's configuration: tells a trace or a plan of one model from those of another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from profiler.errors import ModelError

# What changes from one download or one load to the next without changing the model.
IGNORED_KEYS = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})


def model_fingerprint(model: str | os.PathLike[str]) -> str:
    """SHA-256 over the canonical JSON of a model's ``config.json``, as it stands on disk.

    Keys that change without the model changing (versions, the data type to load in) are left out at every depth.

    Args:
        model: a local folder, or a hub id.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: the model or its ``config.json`` is missing or malformed.
    """
    path = find_config(os.fspath(model))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON; copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds {type(config).__name__}, expected a JSON object; copy the model again")
    canonical = json.dumps(_without_ignored(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_config(model: str) -> Path:
    """The path of a model's ``config.json``; a hub id is looked up in the cache, then on the hub.

    Raises:
        ModelError: there is none.
    """
    if os.path.isdir(model):
        path = Path(model) / "config.json"
        if not path.is_file():
            raise ModelError(f"{model}: holds no config.json; give a folder in Hugging Face format")
        return path
    if os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such model folder; give a folder in Hugging Face format or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model}: neither a local folder nor a model that the hub gives ({type(error).__name__}); check the name, "
            "or give a folder in Hugging Face format"
        ) from error


def _without_ignored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ignored(item) for key, item in value.items() if key not in IGNORED_KEYS}
    if isinstance(value, list):
        return [_without_ignored(item) for item in value]
    return value

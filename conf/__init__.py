"""Configuration: the YAML groups of this folder, composed by Hydra, and the one place that calls it.

Nothing below a package's ``__main__`` sees Hydra: ``compose`` returns plain dictionaries and lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG_FOLDER = Path(__file__).resolve().parent


class ConfigError(ValueError):
    """A setting given on the command line that does not fit the configuration."""


def compose(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose the configuration ``conf/<name>.yaml`` with overrides such as ``cluster=h200x4`` or ``solver.seed=1``.

    An override whose value names a YAML file (``cluster=./measured.yaml``) replaces that whole group by the
    file's content; overrides of single keys (``cluster.nodes=2``) are applied on top of it.

    Args:
        name: root configuration, without the suffix.
        overrides: Hydra overrides, ``key=value``.

    Returns:
        The resolved configuration as plain dictionaries, lists and scalars.

    Raises:
        ConfigError: an override is malformed, names an unknown key or group, or a file that cannot be read.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files, plain, late = _split_overrides(overrides)
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base=None):
            config = hydra_compose(config_name=name, overrides=plain)
        OmegaConf.set_struct(config, False)
        for group, path in files.items():
            config[group] = OmegaConf.load(path)
        for override in late:
            key, value = override.split("=", 1)
            OmegaConf.update(config, key.lstrip("+"), OmegaConf.create({"value": None} | _parse(value)).value)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise ConfigError(_one_line(error, name)) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, Path], list[str], list[str]]:
    """Separate ``group=file.yaml`` from ordinary overrides, and from those that touch a group given as a file."""
    files: dict[str, Path] = {}
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"unexpected argument {override!r}: expected key=value; see --help for the flags")
        key, value = override.split("=", 1)
        if "." not in key and value.endswith((".yaml", ".yml")) and (CONFIG_FOLDER / key).is_dir():
            path = Path(value)
            if not path.is_file():
                raise ConfigError(f"{key}={value}: no such file; name a YAML file or one of {choices(key)}")
            files[key] = path
    rest = [override for override in overrides if override.split("=", 1)[0] not in files]
    late = [override for override in rest if override.lstrip("+").split(".", 1)[0] in files]
    return files, [override for override in rest if override not in late], late


def choices(group: str) -> list[str]:
    """Names of the presets in ``conf/<group>/``, sorted."""
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def _parse(value: str) -> dict[str, Any]:
    import yaml

    return {"value": yaml.safe_load(value)}


def _one_line(error: Exception, name: str) -> str:
    first = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    return f"{first} (settings of conf/{name}.yaml)"

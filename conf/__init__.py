"""Configuration: the YAML groups of this folder, composed by Hydra, and the one place that calls it.

Nothing below a package's ``__main__`` sees Hydra: ``compose`` returns plain dictionaries and lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_FOLDER = Path(__file__).resolve().parent

# The preset under which a group's file given on the command line is known to Hydra.
_GIVEN_FILE = "given_file"


class ConfigError(ValueError):
    """A setting given on the command line that does not fit the configuration."""


def compose(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose the configuration ``conf/<name>.yaml`` with overrides such as ``cluster=h200x4`` or ``solver.seed=1``.

    An override whose value names a YAML file (``cluster=./measured.yaml``) takes that file for the group in place of
    a preset; overrides of single keys (``cluster.nodes=2``) apply on top of it as they do on a preset.

    Args:
        name: root configuration, without the suffix.
        overrides: Hydra overrides, ``key=value``.

    Returns:
        The resolved configuration as plain dictionaries, lists and scalars.

    Raises:
        ConfigError: an override is malformed, names an unknown key or preset, or a file that cannot be read.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    accepted = [_take_file(override) for override in overrides]
    try:
        with initialize_config_dir(config_dir=str(CONFIG_FOLDER), version_base=None):
            config = hydra_compose(config_name=name, overrides=accepted)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OverrideParseException as error:
        raise ConfigError(
            f"cannot read the setting {error.override!r}: quote a value that holds spaces, commas, quotes or brackets "
            f"twice, as in key='\"a value, with a comma\"'"
        ) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is not set: add {error.full_key}=VALUE (see conf/{name}.yaml)") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{_one_line(error)} (see conf/{name}.yaml)") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def choices(group: str) -> list[str]:
    """Names of the presets in ``conf/<group>/``, sorted."""
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def _take_file(override: str) -> str:
    """Check that an override is ``key=value``; where it gives a group as a file, make the file a preset of Hydra's."""
    from hydra.core.config_store import ConfigStore

    group, equals, value = override.partition("=")
    if not equals or not group or group[0] in "~+":  # Hydra's ~key and +key=value would pass unknown or missing keys on
        raise ConfigError(f"unexpected argument {override!r}: expected key=value with a key of conf/; see --help")
    if not (group.isidentifier() and value.endswith((".yaml", ".yml")) and (CONFIG_FOLDER / group).is_dir()):
        return override
    ConfigStore.instance().store(group=group, name=_GIVEN_FILE, node=_read_group(group, Path(value)))
    return f"{group}={_GIVEN_FILE}"


def _read_group(group: str, path: Path) -> DictConfig:
    import yaml
    from omegaconf import DictConfig, OmegaConf

    try:
        content = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{group}={path}: no such file; name a YAML file or one of {choices(group)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{group}={path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig) or not content:
        raise ConfigError(f"{group}={path}: holds no YAML mapping; expected keys and values as in conf/{group}/")
    return content


def _one_line(error: Exception) -> str:
    """An error of Hydra's without its search path, and without advice that does not fit this command line."""
    before_search_path = str(error).split("Config search path:")[0]
    lines = [line.strip() for line in before_search_path.splitlines()]
    advice = ("To append to your", "3. To sweep", "full_key:", "object_type=", "reference_type=")
    return " ".join(line for line in lines if line and not line.startswith(advice))

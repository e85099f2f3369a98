"""What a file of results says about the run that made it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]


def describe_run(packages: tuple[str, ...]) -> dict[str, Any]:
    """Command, commit, device and versions of a run on this machine's CPU, as every file of results states them.

    Args:
        packages: distributions whose versions matter, where they are installed.
    """
    script = Path(sys.argv[0]).resolve()
    program = ["python", str(script)]
    if script.is_relative_to(CHECKOUT):
        module = ".".join(script.relative_to(CHECKOUT).with_suffix("").parts)
        program = ["python", "-m", module.removesuffix(".__main__")]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "commit": _commit(),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages if find_spec(name)},
    }


def _commit() -> str | None:
    """The checkout's commit, None outside of a git checkout."""
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None

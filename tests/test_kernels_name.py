"""The package name ``kernels`` beside Transformers, which looks for a distribution of that name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
from profiler.environment import PackageConflictError, check_environment
try:
    check_environment()
except PackageConflictError as error:
    print("refused:", error)
else:
    print("accepted")
"""

TINY_MIXTRAL = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM
torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4,
)
logits = MixtralForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits
print(tuple(logits.shape), bool(logits.isfinite().all()))
"""


def run_python(program: str, *, search_first: Path | None = None, search_last: Path | None = None) -> str:
    """Output of a program run from the checkout, with folders searched before or after the checkout's packages."""
    folders = [folder for folder in (search_first, ROOT, search_last) if folder is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def accepted_version() -> str:
    """A version of the distribution that the installed Transformers accepts."""
    from transformers.utils import import_utils

    return str(import_utils.KERNELS_MIN_VERSION)


def install_foreign_kernels(folder: Path, version: str) -> None:
    """Stand-in for an installed distribution ``kernels``: its metadata and a package without our operators."""
    metadata = folder / f"kernels-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n", encoding="utf-8")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")


def test_transformers_sees_no_kernels_and_runs_a_mixtral() -> None:
    check = "from transformers.utils.import_utils import is_kernels_available\nprint(is_kernels_available())\n"
    assert run_python(check + CHECK + TINY_MIXTRAL).splitlines() == ["False", "accepted", "(1, 3, 32) True"]


def test_accepted_foreign_version_is_refused_because_loading_a_model_would_fail(tmp_path: Path) -> None:
    install_foreign_kernels(tmp_path, accepted_version())
    output = run_python(CHECK, search_last=tmp_path)
    assert re.match(
        r"refused: Transformers \S+ takes this project's package 'kernels' .* pip uninstall kernels", output
    )
    assert "\n" not in output
    with pytest.raises(AssertionError, match="cannot import name"):
        run_python(TINY_MIXTRAL, search_last=tmp_path)


def test_foreign_version_outside_transformers_range_is_harmless(tmp_path: Path) -> None:
    install_foreign_kernels(tmp_path, "99.0.0")
    output = run_python(CHECK + TINY_MIXTRAL, search_last=tmp_path)
    assert output.splitlines() == ["accepted", "(1, 3, 32) True"]


def test_foreign_package_found_before_ours_is_refused(tmp_path: Path) -> None:
    install_foreign_kernels(tmp_path, "99.0.0")
    output = run_python(CHECK, search_first=tmp_path)
    assert output.startswith(f"refused: 'import kernels' finds {tmp_path}")
    assert "pip uninstall kernels" in output

"""Start-up check of the installed packages: the name ``kernels`` must mean this project's package to everyone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from profiler.errors import InputError

_KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "__init__.py"


class PackageConflictError(InputError):
    """An installed distribution that takes the place of one of this project's packages, or is mistaken for it."""


def check_environment() -> None:
    """Stop where Hugging Face's distribution ``kernels`` and this project's package of that name would be confused.

    Transformers decides by the version of the installed distribution whether to use it, and then imports whatever
    package answers to the name: beside a version that it accepts, it would import ours and fail while loading a model.
    A version that it does not accept is harmless, unless Python finds that distribution before this project.

    Raises:
        PackageConflictError: ``import kernels`` gives another package than ours, or Transformers would use ours.
    """
    remedy = f"run '{sys.executable} -m pip uninstall kernels', or use the project's own environment (make setup)"
    spec = importlib.util.find_spec("kernels")
    found = spec.origin if spec is not None else None
    if found is None or Path(found).resolve() != _KERNELS:
        raise PackageConflictError(f"'import kernels' finds {found}, expected this project's {_KERNELS}; {remedy}")

    import transformers
    from transformers.utils.import_utils import is_kernels_available

    if is_kernels_available():
        raise PackageConflictError(
            f"Transformers {transformers.__version__} takes this project's package 'kernels' for the installed "
            f"distribution of that name; {remedy}"
        )

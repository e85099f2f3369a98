"""Who may import whom: the table of docs/architecture.md, checked on the syntax tree of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("conf", "kernels", "placement", "profiler", "runtime")

# What the profiler offers to the others: the trace, its statistics, and to the runtime the recording seam, the
# start-up check and the reader of prompts.
TRACE_AND_STATISTICS = (
    r"affinity_groups errors fingerprint routing_counts statistics trace_format trace_header trace_writer"
)
SHARED_BY_PROFILER = {f"profiler.{name}" for name in TRACE_AND_STATISTICS.split()}
ALLOWED: dict[str, set[str]] = {
    "conf": set(),
    "kernels": set(),
    "profiler": set(),
    "placement": SHARED_BY_PROFILER,
    "runtime": {
        "placement",
        "kernels",
        "profiler.seam",
        "profiler.environment",
        "profiler.prompts",
        *SHARED_BY_PROFILER,
    },
}

# Modules that run a model; all others of these two packages must import on a machine without torch and transformers.
NEED_TORCH = {f"profiler.{name}" for name in ("gate_ahead", "model_loading", "recorder", "route_buffer", "seam")}


def modules_of(package: str) -> dict[str, Path]:
    """Dotted name → file of every module of a package; a package's own name stands for its __init__.py."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True))


ALL_MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere, in functions and for type checking too."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that the table does not allow."""
    package = module.split(".")[0]
    allowed = {package, *ALLOWED[package], *({"conf"} if module.split(".")[-1] == "__main__" else set())}

    def is_allowed(name: str) -> bool:
        parts = name.split(".")
        return parts[0] not in PACKAGES or any(".".join(parts[: n + 1]) in allowed for n in range(len(parts)))

    return [name for name in imported_names(source, module, is_package) if not is_allowed(name)]


@pytest.mark.parametrize("module", ALL_MODULES)
def test_module_imports_only_what_its_package_may(module: str) -> None:
    path = ALL_MODULES[module]
    forbidden = forbidden_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not forbidden, f"{module} may not import {forbidden}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_was_found(package: str) -> None:
    assert package in ALL_MODULES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("profiler.statistics", "import placement.plan"),
        ("profiler.statistics", "def f():\n    from runtime import engine"),
        ("placement.plan", "from conf import compose"),
        ("placement.plan", "from profiler import seam"),
        ("placement.plan", "import profiler"),
        ("placement.solvers.ilp", "from profiler.seam import find_moe_layers"),
        ("placement.plan", "if TYPE_CHECKING:\n    import runtime.engine"),
        ("kernels.level_dispatch", "from placement.dispatch import level_dispatch"),
        ("runtime.engine", "from profiler.recorder import record"),
        ("runtime.server.app", "import conf.command_line"),
        ("conf.command_line", "from profiler.errors import InputError"),
        ("profiler.__main__", "import runtime"),
    ],
)
def test_forbidden_arrow_is_noticed(module: str, source: str) -> None:
    assert forbidden_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("placement.plan", "from profiler.errors import InputError\nimport json"),
        ("placement.solvers.ilp", "from ..plan import PlacementPlan\nfrom . import chain"),
        ("placement.__main__", "from conf.command_line import run_command_line"),
        (
            "runtime.engine",
            "from placement.plan import PlacementPlan\nfrom kernels.level_dispatch import level_dispatch",
        ),
        ("runtime.engine", "from profiler import seam"),
    ],
)
def test_allowed_arrow_passes(module: str, source: str) -> None:
    assert not forbidden_imports(source, module)


def test_planning_modules_import_without_torch_and_transformers() -> None:
    modules = [name for package in ("placement", "profiler") for name in modules_of(package) if name not in NEED_TORCH]
    assert {"profiler.trace_format", "profiler.statistics", "placement.plan"} <= set(modules)
    assert set(ALL_MODULES) >= NEED_TORCH, "NEED_TORCH names a module that is gone"
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "triton"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(name + ": " + str(error))
sys.exit("\\n".join(failed) or None)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

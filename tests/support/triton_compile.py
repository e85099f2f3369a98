"""Compiles a Triton kernel for Hopper on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def compile_for_sm90(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """Compile a kernel down to the machine code of compute capability 9.0.

    Must run where Triton was imported without TRITON_INTERPRET, see `in_compiler`.

    Args:
        kernel: a function under ``triton.jit``.
        signature: type of every argument that is no constant, such as ``*bf16``, ``i32``, ``fp32``.
        constants: value of every ``tl.constexpr`` argument, and None for pointers that are left out.
        options: of the launch, such as ``num_warps`` and ``num_stages``.

    Returns:
        Triton's compiled kernel; ``asm["ptx"]`` and ``metadata.shared`` tell of it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    missing = set(names) - set(signature) - set(constants)
    assert not missing, f"neither in the signature nor constant: {sorted(missing)}"
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]  # as for tensors that torch allocates
    attributes = {(names.index(name),): aligned for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def in_compiler(code: str) -> None:
    """Run Python code from the checkout's root in a process of its own, with Triton as a compiler."""
    _run(code, {"TRITON_INTERPRET": "0"})


def in_interpreter(code: str) -> None:
    """The same with Triton's interpreter, which must be chosen before Triton is imported."""
    _run(code, {"TRITON_INTERPRET": "1"})


def _run(code: str, variables: dict[str, str]) -> None:
    """Fail with the process' output where it fails."""
    import os

    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

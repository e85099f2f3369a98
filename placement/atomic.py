"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from profiler.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) under a temporary name in the same folder, then move it to ``path``.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; name a file in a folder you can write to") from None

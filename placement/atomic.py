"""Writing text files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from profiler.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name in the same folder, then move it to ``path``.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; name a file in a folder you can write to") from None


def check_writable(path: Path) -> None:
    """Refuse an output path early, before long work.

    Raises:
        InputError: the folder does not exist or cannot be written, or the path is a folder.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: expected a file name in an existing folder that you can write to")

"""Files that options name, looked at before anything begins whose result they are to hold."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ArgumentError

__all__ = ["writable"]


def writable(option: str, name: str, *, replaced: bool = False) -> Path:
    """Where a file is to be written, wherever the program goes meanwhile; nothing is touched.

    Args:
        option: which names the file.
        replaced: another file will take its place, instead of its being written to.

    Raises:
        ArgumentError: nothing can be written there.
    """
    file = Path(os.path.abspath(name))
    try:
        why_not = "no name" if not name else _why_not(file, replaced)
    except OSError as error:
        why_not = str(error.strerror)
    if why_not:
        raise ArgumentError(
            option,
            f"{name!r}: {why_not}",
            "a file that can be written, in a folder that is there",
            "make the folder first (mkdir -p), or name another file",
        )
    return file


def _why_not(file: Path, replaced: bool) -> str:
    if file.is_dir():
        return "it is a folder"
    if not file.parent.is_dir():
        return f"{file.parent} is no folder"
    if replaced and file.exists() and not file.is_file():
        return "it is a device or a pipe, which would be replaced by a file"
    if file.exists() and not replaced:
        return "" if os.access(file, os.W_OK) else "it may not be written to"
    may = os.access(file.parent, os.W_OK | os.X_OK)
    return "" if may else f"nothing may be written into {file.parent}"

"""Whether this process is the command line, which decides by itself when torch is imported."""

from __future__ import annotations

import importlib
import os
import sys

__all__ = ["SCRIPT", "command_line_starts", "complete"]

PACKAGE = __package__.partition(".")[0]
SCRIPT = "flash-attn-npu"
"""The name of the console script."""

_completing = False


def command_line_starts() -> bool:
    """Whether Python was started as our command line, and no command has asked for all names."""
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    if _completing:
        return False
    if name.removesuffix(".exe") == SCRIPT:
        return True
    # "-m" stands there while Python looks for the module, and imports the packages above it
    if name != "-m":
        return False
    words = sys.orig_argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-m"):
            return (word.removeprefix("-m") or following) == PACKAGE
    return False


def complete() -> None:
    """Give the package all its names, which takes torch; harmless where it has them."""
    global _completing
    package = sys.modules[PACKAGE]
    if not hasattr(package, "install"):
        _completing = True
        importlib.reload(package)

"""Which modules of a package are shown under another name: those that are called as theirs are."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Collection, Iterable, Iterator

__all__ = ["mirrored"]


def mirrored(path: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Dotted names below a package, "" for itself; a part that begins with an underscore is hidden.

    Nothing is imported.

    Args:
        path: the package's `__path__`.
        own: names without an underscore that are not shown all the same.
    """
    return ("", *(name for name in _below(path, "") if name not in own))


def _below(path: Iterable[str], prefix: str) -> Iterator[str]:
    folders = list(path)
    for found in sorted(pkgutil.iter_modules(folders), key=lambda module: module.name):
        if found.name.startswith("_"):
            continue
        name = prefix + found.name
        yield name
        if found.ispkg:
            inside = [os.path.join(folder, found.name) for folder in folders]
            yield from _below(inside, f"{name}.")

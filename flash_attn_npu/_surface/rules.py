"""The kinds of exceptions that a comparison allows; the exceptions themselves are elsewhere.

A rule that no longer holds is a defect too: `Comparison` reports it as stale.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

__all__ = ["Absent", "Added", "Different", "Rules"]

_ALL = ("*",)


class Absent(NamedTuple):
    """Upstream's names that we do not serve.

    module: dotted name below the package, or a pattern of such names. names: patterns of names
    there, `Class.method` among them; left out, the whole module cannot be imported.
    """

    module: str
    reason: str
    names: tuple[str, ...] = _ALL


class Added(NamedTuple):
    """Names of ours in a module that upstream has without them."""

    module: str
    reason: str
    names: tuple[str, ...]


class Different(NamedTuple):
    """Parameters of one function or `Class.method` that need not be upstream's."""

    module: str
    reason: str
    function: str
    parameters: tuple[str, ...]


class Rules(NamedTuple):
    """Everything that may differ from upstream, and why."""

    absent: tuple[Absent, ...] = ()
    added: tuple[Added, ...] = ()
    different: tuple[Different, ...] = ()

    def absent_module(self, module: str) -> str | None:
        """Why a whole module is left out, None if it is not."""
        for rule in self.absent:
            if rule.names == _ALL and fnmatchcase(module, rule.module):
                return rule.reason
        return None

    def absent_name(self, module: str, name: str) -> str | None:
        """Why one name of a module is left out, None if it is not."""
        for rule in self.absent:
            here = rule.names != _ALL and fnmatchcase(module, rule.module)
            if here and any(fnmatchcase(name, pattern) for pattern in rule.names):
                return rule.reason
        return None

    def additions(self, module: str) -> set[str]:
        """Names of ours in a module that are there on purpose."""
        return {name for rule in self.added if rule.module == module for name in rule.names}

    def free_parameters(self, module: str, function: str) -> set[str]:
        """Parameters of a function that are not compared."""
        return {
            parameter
            for rule in self.different
            if (rule.module, rule.function) == (module, function)
            for parameter in rule.parameters
        }

    def unmatched(self, surface: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str]]:
        """(module, name) of every rule that speaks of nothing in `surface`, module -> names."""
        for rule in self.absent:
            names = {
                name
                for module in surface
                if fnmatchcase(module, rule.module)
                for name in (surface[module] or ["an empty module"])
            }
            for pattern in rule.names:
                if not any(fnmatchcase(name, pattern) for name in names):
                    yield rule.module, pattern
        for added in self.added:
            if added.module not in surface:
                yield added.module, ", ".join(added.names)
        for different in self.different:
            if different.function not in surface.get(different.module, ()):
                yield different.module, different.function

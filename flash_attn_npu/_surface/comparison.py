"""Compare mirrored modules with a frozen surface: what is served, absent, or wrong.

Generic: it knows neither the names that are compared nor the reasons for leaving one out.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import symtable
import sys
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import cache, reduce
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .._core.ground.memory import snapshot
from .rules import Rules
from .signatures import differences

__all__ = ["Comparison", "Defect", "Module", "compare"]

Entry = Mapping[str, Any]
Surface = Mapping[str, Mapping[str, Entry]]

_NOTHING = object()


class Defect(NamedTuple):
    """One thing that is not as upstream has it, and that no rule allows.

    kind: missing, hidden, spurious, unexposed, kind, identity, base, signature or stale.
    """

    kind: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.detail}"


class Module(NamedTuple):
    """What became of one upstream module.

    name: upstream's, without the package. present: ours can be imported. upstream: the names it
    has there. served: those that are as upstream has them. absent: those that a rule leaves out,
    and why. defects: all that is wrong with the others, and with names that upstream lacks.
    reason: why the whole module is left out, None if no rule says so.
    """

    name: str
    present: bool
    upstream: tuple[str, ...]
    served: tuple[str, ...]
    absent: Mapping[str, str]
    defects: tuple[Defect, ...]
    reason: str | None


class Comparison(NamedTuple):
    """Modules by upstream's name without the package; `defects` belong to none of them."""

    modules: Mapping[str, Module]
    defects: tuple[Defect, ...]


def compare(surface: Surface, package: str, mirrored: Collection[str], rules: Rules) -> Comparison:
    """Import every mirrored module of `package` and compare it with upstream's.

    Args:
        surface: upstream's full module name -> name -> what it is.
        package: our package, which stands for the first part of upstream's module names.
        mirrored: dotted names below the package that are exposed; "" is the package itself.
        rules: what may be absent, added or different.
    """
    below = {full.partition(".")[2]: entries for full, entries in surface.items()}
    modules = {
        name: _One(package, name, name in mirrored, rules).module(entries)
        for name, entries in below.items()
    }
    strangers = [
        Defect("spurious", name, "is exposed, and upstream has no such module")
        for name in sorted(set(mirrored) - set(below))
    ]
    names = {name: {*_with_methods(entries)} for name, entries in below.items()}
    stale = [
        Defect("stale", f"{module}: {name}", "a rule, but nothing of upstream's has that name")
        for module, name in rules.unmatched(names)
    ]
    return Comparison(modules, (*strangers, *stale))


class _One:
    """The comparison of one module."""

    def __init__(self, package: str, name: str, exposed: bool, rules: Rules) -> None:
        self.package, self.name, self.exposed, self.rules = package, name, exposed, rules
        self.real = f"{package}.{name}" if name else package

    def module(self, entries: Mapping[str, Entry]) -> Module:
        """What became of the module that has `entries` upstream."""
        ours = _imported(self.real) if self.exposed else None
        if isinstance(ours, ModuleType):
            return self._present(ours, entries)
        reason = self.rules.absent_module(self.name)
        defects = []
        if ours is not None:
            defects.append(Defect("missing", self.name, f"{self.real} does not import: {ours}"))
        elif _exists(self.real):
            defects.append(Defect("unexposed", self.name, f"{self.real} exists, not exposed"))
        elif reason is None:
            defects.append(Defect("missing", self.name, f"{self.real} does not exist"))
        absent = {} if reason is None else dict.fromkeys(entries, reason)
        return Module(self.name, False, tuple(entries), (), absent, tuple(defects), reason)

    def _present(self, ours: ModuleType, entries: Mapping[str, Entry]) -> Module:
        served, absent, defects = [], {}, []
        if self.rules.absent_module(self.name) is not None:
            defects.append(Defect("stale", self.name, "is served, and said to be absent"))
        for name, entry in entries.items():
            reason = self.rules.absent_name(self.name, name)
            found = getattr(ours, name, _NOTHING)
            if found is _NOTHING and reason is not None:
                absent[name] = reason
                continue
            wrong = [*self._name(ours, name, found, entry)]
            if wrong:
                defects += wrong
            else:
                served.append(name)
        defects += self._spurious(ours, entries)
        return Module(self.name, True, tuple(entries), tuple(served), absent, tuple(defects), None)

    def _name(self, ours: ModuleType, name: str, found: Any, entry: Entry) -> Iterator[Defect]:
        if found is _NOTHING:
            place = _place(self.package, name)
            if place is None:
                yield Defect("missing", name, f"{self.real} has no such name")
            else:
                yield Defect("hidden", name, f"lies in {place}, not in {self.real}")
            return
        if self.rules.absent_name(self.name, name) is not None:
            yield Defect("stale", name, "is served, and said to be absent")
        if not name.startswith("_") and name not in getattr(ours, "__all__", (name,)):
            yield Defect("hidden", name, f"is not in {self.real}.__all__")
        if entry["kind"] == "import":
            yield from self._same_object(name, found, entry["from"])
        elif entry["kind"] == "function":
            yield from self._function(ours, name, found, entry["params"])
        elif entry["kind"] == "class":
            yield from self._class(ours, name, found, entry)

    def _same_object(self, name: str, found: Any, origin: str) -> Iterator[Defect]:
        below = origin.partition(".")[2]
        source = _imported(f"{self.package}.{below}" if below else self.package)
        if getattr(source, name, _NOTHING) is not found:
            yield Defect("identity", name, f"is not the object that {origin} has")

    def _function(
        self, ours: ModuleType, name: str, found: Any, parameters: list[str]
    ) -> Iterator[Defect]:
        if not callable(found) or inspect.isclass(found):
            yield Defect("kind", name, f"is {found!r}, upstream a function")
            return
        free = self.rules.free_parameters(self.name, name)
        for line in differences(parameters, found, vars(ours), free):
            yield Defect("signature", name, line)
        if free and not differences(parameters, found, vars(ours)):
            yield Defect("stale", name, "has upstream's parameters, and is said to differ")

    def _class(self, ours: ModuleType, name: str, found: Any, entry: Entry) -> Iterator[Defect]:
        if not inspect.isclass(found):
            yield Defect("kind", name, f"is {found!r}, upstream a class")
            return
        for base in entry["bases"]:
            known = _named(base, ours)
            if not (inspect.isclass(known) and issubclass(found, known)):
                yield Defect("base", name, f"does not derive from {base}")
        for method, parameters in entry["methods"].items():
            holders = [base for base in found.__mro__ if method in vars(base)]
            left_out = self.rules.absent_name(self.name, f"{name}.{method}") is not None
            if not holders or holders[0] is object:
                if not left_out:
                    yield Defect("missing", f"{name}.{method}", "no such method")
                continue
            if left_out:
                yield Defect("stale", f"{name}.{method}", "is served, and said to be absent")
            function = vars(holders[0])[method]
            if isinstance(function, (staticmethod, classmethod)):
                function = function.__func__
            yield from self._function(ours, f"{name}.{method}", function, parameters)

    def _spurious(self, ours: ModuleType, entries: Mapping[str, Entry]) -> Iterator[Defect]:
        # what is imported and not listed in __all__ is not shown to anybody
        shown = {*getattr(ours, "__all__", ()), *_defined(ours)}
        added = self.rules.additions(self.name)
        for name in sorted(shown - set(entries) - added):
            found = getattr(ours, name, _NOTHING)
            if not (name.startswith("_") or found is _NOTHING or isinstance(found, ModuleType)):
                yield Defect("spurious", name, "upstream has no such name")
        for name in sorted(added):
            if name in entries or name not in shown:
                yield Defect("stale", name, "is said to be added")


def _with_methods(entries: Mapping[str, Entry]) -> Iterator[str]:
    for name, entry in entries.items():
        yield name
        for method in entry.get("methods", ()):
            yield f"{name}.{method}"


def _named(dotted: str, ours: ModuleType) -> Any:
    """What a dotted name of upstream's source means here, None if it means nothing."""
    first, *rest = dotted.split(".")
    names = {**vars(ours), "torch": torch, "nn": torch.nn, "str": str, "Enum": Enum}
    return reduce(getattr, rest, names.get(first))


def _imported(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return error


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _place(package: str, name: str) -> str | None:
    """The loaded module of the package whose file defines `name`."""
    for loaded, module in sorted(snapshot(sys.modules)):
        if (loaded == package or loaded.startswith(f"{package}.")) and name in _defined(module):
            return loaded
    return None


@cache
def _defined(module: ModuleType) -> frozenset[str]:
    """The names that a module's own file binds, imports apart."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return frozenset()
    symbols = symtable.symtable(source, module.__name__, "exec").get_symbols()
    return frozenset(
        symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported()
    )

"""Import machinery that knows no product: a second name for a package, and calls after imports.

Both finders do nothing until inserted into `sys.meta_path`, and leave no trace when removed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..locks import Lock

__all__ = ["AliasFinder", "PostImportFinder", "insert_first", "take_out"]

_LOCK = Lock()


def insert_first(finder: MetaPathFinder) -> None:
    """Put `finder` at the head of `sys.meta_path`, once."""
    with _LOCK:
        if finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)


def take_out(finder: MetaPathFinder) -> None:
    """Remove `finder` from `sys.meta_path` if it is there."""
    with _LOCK:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class AliasFinder(MetaPathFinder):
    """Serves imports of `alias` with the very module objects of `real`.

    Args:
        alias: top-level name to answer for.
        real: importable package that provides the modules.
        submodules: dotted names below the package that exist under the alias too; "" is the
            package itself. Everything else below `real` is absent under the alias.
    """

    def __init__(self, alias: str, real: str, submodules: Iterable[str]) -> None:
        self._alias = alias
        self._real = real
        self._names = {_join(alias, name): _join(real, name) for name in submodules}

    def insert(self) -> None:
        """Start answering."""
        insert_first(self)

    def remove(self) -> None:
        """Stop answering, and forget every module served under the alias."""
        with _LOCK:
            take_out(self)
            for name in self._names:
                if self.owns(name, sys.modules.get(name)):
                    del sys.modules[name]

    def owns(self, name: str, module: ModuleType | None) -> bool:
        """Whether `module` is what this finder serves, or would serve, as `name`."""
        real = self._names.get(name)
        return real is not None and module is not None and module is sys.modules.get(real)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """A spec whose loader hands out the real module; None for names that are not mirrored."""
        real = self._names.get(fullname)
        if real is None:
            self._hide_private(fullname)
            return None
        found = importlib.util.find_spec(real)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        spec = ModuleSpec(
            fullname, _SameModule(fullname, real), origin=found.origin, is_package=is_package
        )
        if found.submodule_search_locations is not None:
            spec.submodule_search_locations = list(found.submodule_search_locations)
        return spec

    def _hide_private(self, fullname: str) -> None:
        # the alias shares its real __path__, so the path finder behind us would load a second
        # copy of any module of ours that is not mirrored
        parent, _, child = fullname.rpartition(".")
        real_parent = self._names.get(parent)
        if real_parent is not None and importlib.util.find_spec(f"{real_parent}.{child}"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


class PostImportFinder(MetaPathFinder):
    """Calls back with a module right after it was imported.

    Args:
        callbacks: full module name -> what to call with the module.
    """

    def __init__(self, callbacks: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._callbacks = dict(callbacks)

    def insert(self) -> None:
        """Start watching, and call back at once for modules that are already imported."""
        insert_first(self)
        for name, callback in self._callbacks.items():
            module = sys.modules.get(name)
            if module is not None:
                callback(module)

    def remove(self) -> None:
        """Stop watching."""
        take_out(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """What the finders behind this one find, with a loader that calls back."""
        callback = self._callbacks.get(fullname)
        if callback is None:
            return None
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in behind:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallAfter(spec.loader, callback)
                return spec
        return None


class _SameModule(Loader):
    """Puts an existing module under a second name.

    Returning the module from `create_module` would let the import system overwrite its
    `__spec__` and `__name__`, so it is swapped in only when "executing".
    """

    def __init__(self, name: str, real: str) -> None:
        self._name = name
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[self._name] = importlib.import_module(self._real)


class _CallAfter(Loader):
    """A loader that steps aside before the module runs, and calls back afterwards."""

    def __init__(self, loader: Loader, callback: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._callback(module)

    def __getattr__(self, name: str) -> Any:
        # get_code, get_resource_reader and whatever else only the real loader has
        return getattr(self._loader, name)


def _join(package: str, submodule: str) -> str:
    return f"{package}.{submodule}" if submodule else package

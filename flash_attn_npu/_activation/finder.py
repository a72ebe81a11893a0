"""Import machinery that knows no product: a second name for a package, and calls after imports.

Both finders do nothing until inserted into `sys.meta_path`, and leave no trace when removed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, MappingProxyType, ModuleType
from typing import Any

from .._core.ground.locks import Lock
from .._integrations.untouched import is_promise, namespace

__all__ = ["AliasFinder", "Facade", "PostImportFinder", "insert_first", "take_out"]

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


class Facade(ModuleType):
    """A package under a second name, with fewer names.

    The names that are shown are read from the package and written to it, so that a patch made
    on either side counts on both. Anything else is absent, and what is set stays here.
    """

    __slots__ = ("__real__", "__shown__")
    __real__: str
    __shown__: frozenset[str]

    def __init__(self, name: str, real: str, shown: frozenset[str]) -> None:
        super().__init__(name)
        self.__real__ = real
        self.__shown__ = shown

    @property
    def __dict__(self) -> Mapping[str, Any]:  # type: ignore[override]
        """For who restores what is found here, as mocks do; written to, it could not be right."""
        there = namespace(importlib.import_module(self.__real__))
        shown = {name: there[name] for name in self.__shown__ if name in there}
        return MappingProxyType({**namespace(self), **shown})

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [one for one in dir(self) if not one.startswith("_")]
        if name in self.__shown__:
            there = namespace(importlib.import_module(self.__real__))
            if name in there:
                return there[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in Facade.__slots__ and name in self.__shown__:
            setattr(importlib.import_module(self.__real__), name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__shown__:
            delattr(importlib.import_module(self.__real__), name)
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        # wherever the package is, installed under the second name or not
        return importlib.import_module, (self.__real__,)


class AliasFinder(MetaPathFinder):
    """Serves imports of `alias` with the modules of `real`.

    The modules below the package are the very same objects. The package itself is a `Facade`,
    as its own namespace cannot hide from one importer what it has for another.

    Args:
        alias: top-level name to answer for.
        real: importable package that provides the modules.
        submodules: dotted names below the package that exist under the alias too; "" is the
            package itself. Everything else below `real` is absent under the alias.
        names: what the package shows under the alias, apart from these submodules.
        why_absent: says why a dotted name below the package is left out, None if it does not
            know; an import that fails tells it.
    """

    def __init__(
        self,
        alias: str,
        real: str,
        submodules: Iterable[str],
        names: Iterable[str] = (),
        why_absent: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self._alias = alias
        self._names = {_join(alias, name): _join(real, name) for name in submodules}
        children = {name.partition(".")[2] for name in self._names}
        shown = frozenset({*names, *(name for name in children if name and "." not in name)})
        self._facade = Facade(alias, real, shown)
        self._why_absent = why_absent

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
        if real is None or module is None:
            return False
        # whoever writes sys.modules[alias] = real means what we mean
        return module is sys.modules.get(real) or (name == self._alias and module is self._facade)

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
            self._explain_absence(fullname, sys._getframe(1))
            return None
        found = importlib.util.find_spec(real)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        facade = self._facade if fullname == self._alias else None
        spec = ModuleSpec(
            fullname,
            _SameModule(fullname, real, facade),
            origin=found.origin,
            is_package=is_package,
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

    def _explain_absence(self, fullname: str, asker: FrameType | None) -> None:
        # only an import may fail with words: whoever asks for a spec gets None. If Python should
        # call its function otherwise one day, the words are lost and nothing else
        caller = None if asker is None else asker.f_back
        if caller is None or caller.f_code.co_name != "_find_and_load_unlocked":
            return
        package, _, name = fullname.partition(".")
        reason = self._why_absent(name) if package == self._alias else None
        if reason is not None:
            raise ModuleNotFoundError(f"No module named {fullname!r}: {reason}", name=fullname)


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
                self._call(callback, module)

    def remove(self) -> None:
        """Stop watching."""
        take_out(self)
        for name in self._callbacks:
            spec = namespace(sys.modules.get(name)).get("__spec__")
            if isinstance(spec, ModuleSpec) and isinstance(spec.loader, _CallAfter):
                spec.loader = spec.loader.wrapped

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
                    spec.loader = _CallAfter(spec.loader, functools.partial(self._call, callback))
                return spec
        return None

    def _call(self, callback: Callable[[ModuleType], None], module: ModuleType) -> None:
        spec = namespace(module).get("__spec__")
        if not is_promise(module):
            self._call_loaded(callback, module)
        elif isinstance(spec, ModuleSpec) and spec.loader is not None:
            spec.loader = _CallAfter(spec.loader, functools.partial(self._call_loaded, callback))

    def _call_loaded(self, callback: Callable[[ModuleType], None], module: ModuleType) -> None:
        # an import that began while we watched may end after it
        if self in sys.meta_path:
            callback(module)


class _SameModule(Loader):
    """Puts an existing module under a second name.

    Returning the module from `create_module` would let the import system overwrite its
    `__spec__` and `__name__`, so it is swapped in only when "executing".
    """

    def __init__(self, name: str, real: str, facade: Facade | None) -> None:
        self._name = name
        self._real = real
        self._facade = facade

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        real = importlib.import_module(self._real)
        if self._facade is None:
            sys.modules[self._name] = real
        elif module is self._facade:
            importlib.reload(real)
        else:
            own = namespace(self._facade)
            own.update(vars(module), __file__=real.__file__, __doc__=real.__doc__)
            sys.modules[self._name] = self._facade


class _CallAfter(Loader):
    """A loader that steps aside before the module runs, and calls back afterwards."""

    def __init__(self, loader: Loader, callback: Callable[[ModuleType], None]) -> None:
        self.wrapped = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.wrapped
        if module.__spec__ is not None:
            module.__spec__.loader = self.wrapped
        self.wrapped.exec_module(module)
        self._callback(module)

    def __getattr__(self, name: str) -> Any:
        # get_code, get_resource_reader and whatever else only the real loader has
        return getattr(self.wrapped, name)


def _join(package: str, submodule: str) -> str:
    return f"{package}.{submodule}" if submodule else package

"""What a start of Python does so that `import flash_attn` may be served: nearly nothing.

`install(children=True)` and the launcher set FLASH_ATTN_NPU_INSTALL. A `.pth` and a `.start` file
in site-packages call `start()`, which puts one finder into `sys.meta_path` where it is set. That
finder imports flash_attn_npu, and torch with it, when the program imports flash_attn, or a module
of a client that would decide without asking for it.

Importing anything of the package imports torch, so a module at the root of site-packages loads
this without it, under the name by which the package finds it later. It imports nothing of ours.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType
    from typing import Any

VARIABLE = "FLASH_ATTN_NPU_INSTALL"
OFF = ("", "0")
WORDS = ("1", "fa3", "force")
"""1: serve flash_attn. fa3: FlashAttention 3 as well. force: even where a real one would be found.

Several are joined by commas, and each implies the first."""

FLASH_ATTN_VERSION = "2.8.3"
"""What `flash_attn.__version__` and the `flash-attn` metadata say while we are installed.

Not 2.8.4: Transformer Engine and xformers refuse versions from there on."""

FLASH_ATTN_3_VERSION = "3.0.0"

PACKAGE = "flash_attn_npu"
PROVIDER = "flash-attn-npu-shim"
ALIAS = "flash_attn"
ALIASES_3 = {
    "flash_attn_3": ("_flash_attn_3", "__init__.py"),
    "flash_attn_interface": ("_flash_attn_3", "flash_attn_interface.py"),
}
"""FlashAttention 3's top-level names, and where they lie in the package."""

INFO = f"{ALIAS}-{FLASH_ATTN_VERSION}.dist-info"
MARK = "served_by_flash_attn_npu"
"""The folder of flash-attn's metadata, and the file in it that says they are `activate`'s."""

CLIENTS = ("transformers",)
"""What goes past flash_attn on a machine without CUDA: the package changes modules of it."""


def start() -> None:
    """Follow FLASH_ATTN_NPU_INSTALL: do nothing, wait for flash_attn, or say what is wrong."""
    value = os.environ.get(VARIABLE, "")
    if value in OFF:
        return
    words = value.split(",")
    if set(words) <= set(WORDS):
        _wait(words)
    else:
        expected = f"0, or some of {', '.join(WORDS)} joined by commas"
        say(f"flash_attn is not served: {VARIABLE} is {value!r}; allowed: {expected}")


def start_activated() -> None:
    """Wait for flash_attn where `activate` made that permanent, unless the variable says 0."""
    if os.environ.get(VARIABLE) == "0":
        return
    start()
    if activated():
        _wait(["1"]).on_disk = True


def activated() -> bool:
    """Whether this interpreter is of an environment in which `activate` has done its work."""
    return any(os.path.exists(os.path.join(folder, INFO, MARK)) for folder in sys.path)


def waiting() -> Waiting | None:
    """The finder that waits; None if there is none, or none any more."""
    return next((finder for finder in sys.meta_path if isinstance(finder, Waiting)), None)


_said: set[str] = set()


def say(text: str) -> None:
    """One line on stderr: there is no log yet, and a start must not fail.

    Once: Python reads the start files of a virtual environment twice.
    """
    if sys.stderr is not None and text not in _said:
        _said.add(text)
        print(f"{PACKAGE}: {text}", file=sys.stderr)


class Waiting:
    """Stands in `sys.meta_path` for `install()`, until more is wanted than to know of flash_attn.

    words: those of the variable. on_disk: whether the distribution is there without this.
    """

    def __init__(self) -> None:
        self.words: set[str] = set()
        self.on_disk = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """A promise of flash_attn, to be kept by its import; None for anything else."""
        if fullname == ALIAS or (fullname in ALIASES_3 and "fa3" in self.words):
            return None if self.stands_back(fullname) else self._promise(fullname)
        top, _, below = fullname.partition(".")
        if below and top in CLIENTS and not self.stands_back(ALIAS):
            self._give_way()
            return _found_by(sys.meta_path, fullname, path)
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """The distribution that `install()` will show, for who asks before the import."""
        asked = {} if context is None else vars(context)
        place = _folder()
        if "path" in asked or not place:
            return
        kind = light("_activation", "distribution").VirtualDistribution
        ours: list[tuple[str, str, tuple[str, ...]]]
        ours = [] if self.on_disk else [("flash-attn", FLASH_ATTN_VERSION, (ALIAS,))]
        if "fa3" in self.words:
            ours.append(("flash_attn_3", FLASH_ATTN_3_VERSION, tuple(ALIASES_3)))
        for name, version, modules in ours:
            shown = kind(name, version, "\n".join(modules), PROVIDER, os.path.dirname(place))
            if shown.answers(asked.get("name")) and not self.stands_back(modules[0]):
                yield shown

    def stands_back(self, name: str) -> bool:
        """Whether somebody else has the name, or nothing of ours is left to serve it with."""
        if not _folder():
            return True
        if "force" in self.words:
            return False
        others = [finder for finder in sys.meta_path if finder is not self]
        return getattr(_found_by(others, name, None), "loader", None) is not None

    def create_module(self, spec: Any) -> None:
        """Let Python make a module, which nobody will see."""

    def exec_module(self, module: ModuleType) -> None:
        """Keep the promise."""
        name = module.__name__
        # install() would take the entry for a flash_attn of somebody else
        sys.modules.pop(name, None)
        self._give_way()
        __import__(name)

    def _give_way(self) -> None:
        try:
            # it sees us waiting, and installs itself
            __import__(PACKAGE)
        finally:
            if self in sys.meta_path:
                sys.meta_path.remove(self)

    def _promise(self, name: str) -> Any:
        from importlib.machinery import ModuleSpec

        file = os.path.join(_folder(), *ALIASES_3.get(name, ("__init__.py",)))
        spec = ModuleSpec(name, self, origin=file)  # type: ignore[arg-type]
        if os.path.basename(file) == "__init__.py":
            spec.submodule_search_locations = [os.path.dirname(file)]
        return spec


def _wait(words: Iterable[str]) -> Waiting:
    finder = waiting()
    if finder is None:
        finder = Waiting()
        sys.meta_path.insert(0, finder)
    finder.words.update(words)
    return finder


def _found_by(finders: Iterable[Any], name: str, path: Any) -> Any:
    for finder in list(finders):
        # pip 26.3 has one that counts a look as an import, which it forbids while it installs
        if type(finder).__module__.partition(".")[0] == "pip" or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None


def _folder() -> str:
    """Where the package lies, found without importing it; empty if it is gone."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, Waiting)]
    spec = _found_by(finders, PACKAGE, None)
    return os.path.dirname(spec.origin) if spec is not None and spec.origin else ""


def light(*name: str) -> Any:
    """A module of the package that imports nothing of it, run without the package."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    # not by its file: the package may lie in a zip
    place = os.path.join(_folder(), *name[:-1])
    spec = PathFinder.find_spec(".".join((f"_{PACKAGE}", *name)), [place])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

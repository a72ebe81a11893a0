"""The import finders on a mock package: they know no product, so neither do these tests."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import re
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from flash_attn_npu._activation.finder import AliasFinder, PostImportFinder
from flash_attn_npu._integrations.untouched import is_promise, namespace

cloudpickle = pytest.importorskip("cloudpickle")

pytestmark = pytest.mark.usefixtures("import_system")

FILES = {
    "__init__.py": "VERSION = 1\ndef func():\n    return 1\ndef ours():\n    pass\n",
    "core.py": "class Layer:\n    pass\n",
    "private.py": "",
    "sub/__init__.py": "",
    "sub/leaf.py": "import time\ntime.sleep(0.05)\n",
    "broken.py": "raise RuntimeError('does not load')\n",
}
SHOWN = ("func", "VERSION", "not_there")
MIRRORED = ("", "core", "sub", "sub.leaf", "listed_but_absent", "broken")


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        file = tmp_path / "realpkg" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def alias(import_system: None) -> Iterator[AliasFinder]:
    reasons = {"left_out": "for a reason"}
    finder = AliasFinder("aliased", "realpkg", MIRRORED, SHOWN, reasons.get)
    finder.insert()
    yield finder
    finder.remove()


@pytest.mark.parametrize("name", [".core", ".sub", ".sub.leaf"])
@pytest.mark.parametrize("alias_first", [True, False])
@pytest.mark.usefixtures("alias")
def test_one_object_under_both_names(name: str, alias_first: bool) -> None:
    order = ["aliased", "realpkg"] if alias_first else ["realpkg", "aliased"]
    first, second = (importlib.import_module(package + name) for package in order)
    assert first is second
    assert first.__name__ == "realpkg" + name
    assert first.__spec__ is not None
    assert first.__spec__.name == "realpkg" + name


@pytest.mark.usefixtures("alias")
class TestFacade:
    """The package itself under its second name: fewer names, the same values."""

    @pytest.fixture
    def pair(self, alias: AliasFinder) -> tuple[ModuleType, ModuleType]:
        return importlib.import_module("aliased"), importlib.import_module("realpkg")

    def test_shows_the_names_that_are_mirrored_and_no_others(
        self, pair: tuple[ModuleType, ModuleType]
    ) -> None:
        aliased, real = pair
        importlib.import_module("realpkg.private")
        importlib.import_module("realpkg.core")
        assert {name for name in dir(aliased) if name[0] != "_"} == {"VERSION", "func", "core"}
        assert sorted(aliased.__all__) == ["VERSION", "core", "func"]
        assert aliased.func is real.func
        assert aliased.core is real.core
        for name in ("ours", "private", "not_there", "nope"):
            message = f"module 'aliased' has no attribute '{name}'"
            with pytest.raises(AttributeError, match=message):
                getattr(aliased, name)
            with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'aliased'"):
                exec(f"from aliased import {name}")
        scope: dict[str, object] = {}
        exec("from aliased import *", scope)
        assert set(scope) - {"__builtins__"} == {"VERSION", "func", "core"}
        assert {name for name, _ in inspect.getmembers(aliased, inspect.isfunction)} == {"func"}

    def test_describes_itself_as_the_package(self, pair: tuple[ModuleType, ModuleType]) -> None:
        aliased, real = pair
        assert aliased.__name__ == "aliased"
        assert aliased.__spec__ is importlib.util.find_spec("aliased")
        assert aliased.__spec__ is not None
        assert aliased.__spec__.name == "aliased"
        assert aliased.__file__ == aliased.__spec__.origin == real.__file__
        assert list(aliased.__path__) == list(real.__path__)
        assert "def func" in inspect.getsource(aliased)

    @pytest.mark.parametrize("side", [0, 1])
    def test_a_patch_on_either_side_counts_on_both(
        self, pair: tuple[ModuleType, ModuleType], side: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = pair[1].func
        with monkeypatch.context() as patch:
            patch.setattr(pair[side], "func", len)
            assert pair[0].func is pair[1].func is len
        assert pair[0].func is pair[1].func is original
        with mock.patch(f"{pair[side].__name__}.func", abs):
            assert pair[0].func is pair[1].func is abs
        assert pair[0].func is pair[1].func is original

    def test_what_a_client_adds_stays_here(self, pair: tuple[ModuleType, ModuleType]) -> None:
        aliased, real = pair
        aliased.extra = aliased.ours = 1  # type: ignore[attr-defined]
        assert not hasattr(real, "extra")
        assert callable(real.ours)
        assert {"extra", "ours"} <= set(dir(aliased)) == set(vars(aliased))
        assert vars(aliased)["func"] is real.func
        with pytest.raises(TypeError):
            vars(aliased)["func"] = len
        del aliased.extra
        assert not hasattr(aliased, "extra")

    def test_reload_reloads_the_package(self, pair: tuple[ModuleType, ModuleType]) -> None:
        aliased, real = pair
        aliased.VERSION = 2  # type: ignore[attr-defined]
        assert importlib.reload(aliased) is aliased is sys.modules["aliased"]
        assert real.VERSION == aliased.VERSION == 1

    @pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
    def test_a_pickled_reference_loads_wherever_the_package_is(
        self,
        pair: tuple[ModuleType, ModuleType],
        alias: AliasFinder,
        dumps: Callable[[object], bytes],
    ) -> None:
        pickled = dumps(pair[0])
        assert pickle.loads(b"caliased\nfunc\n.") is pair[1].func
        alias.remove()
        assert pickle.loads(pickled) is pair[1]

    def test_it_is_one_object_for_good(
        self, pair: tuple[ModuleType, ModuleType], alias: AliasFinder
    ) -> None:
        alias.remove()
        assert pair[0].func is pair[1].func
        alias.insert()
        assert importlib.import_module("aliased") is pair[0]

    def test_whoever_aliases_by_hand_is_not_a_stranger(
        self, pair: tuple[ModuleType, ModuleType], alias: AliasFinder
    ) -> None:
        sys.modules["aliased"] = pair[1]
        assert alias.owns("aliased", pair[1])
        alias.remove()
        assert "aliased" not in sys.modules

    def test_compiled_code_reads_through_it(self, pair: tuple[ModuleType, ModuleType]) -> None:
        pair[1].func = lambda x: 2 * x  # type: ignore[attr-defined]
        aliased = pair[0]
        double = torch.compile(lambda x: aliased.func(x), fullgraph=True, backend="eager")
        assert double(torch.ones(1)).item() == 2
        pair[1].func = lambda x: 3 * x  # type: ignore[attr-defined]
        assert double(torch.ones(1)).item() == 3


@pytest.mark.usefixtures("alias")
def test_an_absent_module_says_why_when_imported_and_is_none_when_asked_for() -> None:
    assert importlib.util.find_spec("aliased.left_out") is None
    for statement in ("import aliased.left_out", "from aliased.left_out import anything"):
        with pytest.raises(
            ModuleNotFoundError, match=r"^No module named 'aliased\.left_out': for a reason$"
        ) as caught:
            exec(statement)
        assert caught.value.name == "aliased.left_out"
    with pytest.raises(ImportError, match="cannot import name 'left_out'"):
        exec("from aliased import left_out")


@pytest.mark.usefixtures("alias")
def test_deep_find_spec_before_any_import() -> None:
    spec = importlib.util.find_spec("aliased.sub.leaf")
    assert spec is not None
    assert spec.origin == importlib.util.find_spec("realpkg.sub.leaf").origin  # type: ignore[union-attr]
    assert "realpkg.sub.leaf" not in sys.modules
    package = importlib.util.find_spec("aliased")
    assert package is not None
    assert package.submodule_search_locations


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("name", ["aliased.nope", "aliased.sub.nope", "aliased.listed_but_absent"])
def test_unknown_submodules_are_absent(name: str) -> None:
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"No module named {name!r}")) as caught:
        importlib.import_module(name)
    assert caught.value.name == name
    assert name not in sys.modules


@pytest.mark.usefixtures("alias")
def test_modules_that_are_not_mirrored_do_not_load_twice() -> None:
    importlib.import_module("realpkg.private")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'aliased\.private'") as caught:
        importlib.import_module("aliased.private")
    assert caught.value.name == "aliased.private"
    assert "aliased.private" not in sys.modules


@pytest.mark.usefixtures("alias")
def test_a_module_that_fails_to_load_leaves_no_entry() -> None:
    with pytest.raises(RuntimeError, match="does not load"):
        importlib.import_module("aliased.broken")
    assert "aliased.broken" not in sys.modules
    assert "realpkg.broken" not in sys.modules


@pytest.mark.usefixtures("alias")
def test_other_names_are_not_answered() -> None:
    assert importlib.util.find_spec("aliased_not") is None
    assert importlib.util.find_spec("json") is not None


@pytest.mark.usefixtures("alias")
def test_reload_walk_and_invalidate_keep_working() -> None:
    aliased = importlib.import_module("aliased")
    importlib.invalidate_caches()
    assert importlib.reload(aliased) is aliased
    (Path(aliased.__path__[0]) / "broken.py").unlink()
    walked = {module.name for module in pkgutil.walk_packages(aliased.__path__, "aliased.")}
    assert {"aliased.core", "aliased.sub.leaf"} <= walked
    assert sys.modules["aliased.sub"] is sys.modules["realpkg.sub"]


def test_pickles(alias: AliasFinder) -> None:
    core = importlib.import_module("aliased.core")
    ours = pickle.dumps(core.Layer())
    assert b"aliased" not in ours
    foreign = ours.replace(b"\x8c\x0crealpkg.core", b"\x8c\x0caliased.core")
    assert isinstance(pickle.loads(foreign), core.Layer)
    alias.remove()
    assert isinstance(pickle.loads(ours), core.Layer)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(foreign)


def test_removal_leaves_nothing() -> None:
    finders, modules = list(sys.meta_path), set(sys.modules)
    finder = AliasFinder("aliased", "realpkg", MIRRORED)
    finder.insert()
    finder.insert()
    assert sys.meta_path == [finder, *finders]
    importlib.import_module("aliased.sub.leaf")
    finder.remove()
    finder.remove()
    assert sys.meta_path == finders
    assert {name for name in set(sys.modules) - modules if name.startswith("aliased")} == set()
    assert importlib.util.find_spec("aliased") is None
    assert sys.modules["realpkg"].__spec__.name == "realpkg"  # type: ignore[union-attr]


def test_removal_leaves_foreign_modules_under_the_name_alone(alias: AliasFinder) -> None:
    foreign = ModuleType("aliased.core")
    sys.modules["aliased.core"] = foreign
    alias.remove()
    assert sys.modules.pop("aliased.core") is foreign


@pytest.mark.usefixtures("alias")
def test_threads_that_import_both_names_at_once_get_one_object() -> None:
    names = ["aliased.sub.leaf", "realpkg.sub.leaf"] * 8
    got: list[ModuleType] = []
    start = threading.Barrier(len(names))

    def load(name: str) -> None:
        start.wait()
        got.append(importlib.import_module(name))

    threads = [threading.Thread(target=load, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(got) == len(names)
    assert len({id(module) for module in got}) == 1


class LazyFinder(MetaPathFinder):
    """Makes one module lazy, as `importlib.util.LazyLoader` does for whoever asks it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        assert spec is not None
        assert spec.loader is not None
        spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


class TestPostImport:
    @pytest.fixture
    def seen(self) -> list[ModuleType]:
        return []

    @pytest.fixture
    def finder(self, seen: list[ModuleType]) -> Iterator[PostImportFinder]:
        finder = PostImportFinder(dict.fromkeys(("realpkg.core", "realpkg.broken"), seen.append))
        finder.insert()
        yield finder
        finder.remove()

    @pytest.mark.usefixtures("finder")
    def test_called_once_after_import_with_the_loader_as_without_us(
        self, seen: list[ModuleType]
    ) -> None:
        spec = importlib.util.find_spec("realpkg.core")
        assert spec is not None
        assert spec.loader.get_code("realpkg.core")  # type: ignore[union-attr]
        assert seen == []
        core = importlib.import_module("realpkg.core")
        importlib.import_module("realpkg.core")
        assert seen == [core]
        assert hasattr(core, "Layer")
        plain = importlib.import_module("realpkg.private")
        assert type(core.__loader__) is type(plain.__loader__)
        assert core.__spec__ is not None
        assert core.__spec__.loader is core.__loader__

    def test_called_at_once_for_what_is_there(self, seen: list[ModuleType]) -> None:
        core = importlib.import_module("realpkg.core")
        finder = PostImportFinder({"realpkg.core": seen.append})
        finder.insert()
        finder.remove()
        assert seen == [core]

    @pytest.mark.usefixtures("finder")
    def test_not_called_when_the_import_fails(self, seen: list[ModuleType]) -> None:
        with pytest.raises(RuntimeError, match="does not load"):
            importlib.import_module("realpkg.broken")
        assert seen == []

    def test_not_called_after_removal(
        self, finder: PostImportFinder, seen: list[ModuleType]
    ) -> None:
        finder.remove()
        importlib.import_module("realpkg.core")
        assert seen == []

    @pytest.mark.parametrize("lazy_first", [True, False])
    def test_a_lazy_module_is_not_loaded_and_heard_of_when_it_is(
        self, seen: list[ModuleType], lazy_first: bool
    ) -> None:
        finder = PostImportFinder({"realpkg.core": seen.append})
        if not lazy_first:
            finder.insert()
        lazily = LazyFinder("realpkg.core")
        sys.meta_path.insert(1, lazily)
        core = importlib.import_module("realpkg.core")
        if lazy_first:
            finder.insert()
        assert seen == []
        assert is_promise(core)
        assert hasattr(core, "Layer")
        assert not is_promise(core)
        assert seen == [core]
        finder.remove()

    @pytest.mark.parametrize("lazy_first", [True, False])
    def test_a_lazy_module_that_loads_after_removal_is_not_heard_of(
        self, seen: list[ModuleType], lazy_first: bool
    ) -> None:
        finder = PostImportFinder({"realpkg.core": seen.append})
        if not lazy_first:
            finder.insert()
        lazily = LazyFinder("realpkg.core")
        sys.meta_path.insert(1, lazily)
        core = importlib.import_module("realpkg.core")
        if lazy_first:
            finder.insert()
        finder.remove()
        assert is_promise(core)
        spec = namespace(core)["__spec__"]
        assert type(spec.loader).__module__ != "flash_attn_npu._activation.finder"
        assert hasattr(core, "Layer")
        assert seen == []

    def test_not_called_when_the_import_ends_after_removal(
        self, finder: PostImportFinder, seen: list[ModuleType], tmp_path: Path
    ) -> None:
        (tmp_path / "realpkg" / "core.py").write_text("import builtins\nbuiltins.in_the_middle()\n")
        with mock.patch("builtins.in_the_middle", finder.remove, create=True):
            importlib.import_module("realpkg.core")
        assert seen == []

    @pytest.mark.usefixtures("finder")
    def test_two_watchers_both_hear(self, seen: list[ModuleType]) -> None:
        other: list[ModuleType] = []
        second = PostImportFinder({"realpkg.core": other.append})
        second.insert()
        core = importlib.import_module("realpkg.core")
        second.remove()
        assert seen == other == [core]

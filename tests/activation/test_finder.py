"""The import finders on a mock package: they know no product, so neither do these tests."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import pkgutil
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flash_attn_npu.activation.finder import AliasFinder, PostImportFinder

pytestmark = pytest.mark.usefixtures("import_system")

FILES = {
    "__init__.py": "",
    "core.py": "class Layer:\n    pass\n",
    "private.py": "",
    "sub/__init__.py": "",
    "sub/leaf.py": "import time\ntime.sleep(0.05)\n",
    "broken.py": "raise RuntimeError('does not load')\n",
}
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
    finder = AliasFinder("aliased", "realpkg", MIRRORED)
    finder.insert()
    yield finder
    finder.remove()


@pytest.mark.parametrize("name", ["", ".core", ".sub", ".sub.leaf"])
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

    @pytest.mark.usefixtures("finder")
    def test_two_watchers_both_hear(self, seen: list[ModuleType]) -> None:
        other: list[ModuleType] = []
        second = PostImportFinder({"realpkg.core": other.append})
        second.insert()
        core = importlib.import_module("realpkg.core")
        second.remove()
        assert seen == other == [core]

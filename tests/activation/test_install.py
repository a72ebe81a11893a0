"""`install()` against everything that may hold the name flash_attn, each case in a new process."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., str]


@pytest.fixture
def real_flash_attn(tmp_path: Path) -> Path:
    """A folder with an on-disk package and distribution called flash_attn."""
    folder = tmp_path / "elsewhere"
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .core import func\n__version__ = '2.1.0'\n")
    (package / "core.py").write_text("def func():\n    pass\n")
    info = folder / "flash_attn-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.1.0\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    return folder


def test_every_spelling_of_the_import_gives_our_modules(script: Script) -> None:
    script(
        """
        import importlib.metadata as metadata, importlib.util
        import flash_attn_npu
        assert not flash_attn_npu.installed()
        flash_attn_npu.install()
        assert flash_attn_npu.installed()
        assert importlib.util.find_spec("flash_attn.bert_padding") is not None

        import flash_attn, flash_attn.bert_padding as padding
        from flash_attn import bert_padding, flash_attn_interface, flash_attn_func
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
        assert padding is bert_padding is flash_attn_npu.bert_padding
        assert flash_attn_func is flash_attn_interface.flash_attn_func
        assert flash_attn_npu.__spec__.name == flash_attn_npu.__name__ == "flash_attn_npu"

        assert flash_attn.__version__ == metadata.version("flash_attn")
        assert flash_attn.__version__ == metadata.version("flash-attn")
        assert metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        """
    )


def test_what_is_not_mirrored_is_absent(script: Script) -> None:
    script(
        """
        import importlib, importlib.util
        import flash_attn_npu
        from flash_attn_npu._activation.install import MIRRORED
        flash_attn_npu.install()
        for name in MIRRORED:
            assert importlib.util.find_spec(f"flash_attn.{name}".rstrip(".")) is not None, name
        for name in ("cute", "flash_attention", "models.btlm"):
            assert importlib.util.find_spec(f"flash_attn.{name}") is None
        for name in ("cute", "errors", "activation", "_version", "__main__"):
            try:
                importlib.import_module(f"flash_attn.{name}")
            except ModuleNotFoundError as error:
                assert error.name == f"flash_attn.{name}"
            else:
                raise AssertionError(name)
        """
    )


def test_import_before_install_finds_nothing_and_does_not_spoil_it(script: Script) -> None:
    script(
        """
        try:
            import flash_attn
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError
        import importlib.metadata as metadata
        assert "flash_attn" not in metadata.packages_distributions()
        import flash_attn_npu
        flash_attn_npu.install()
        import flash_attn
        assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
        """
    )


def test_uninstall_leaves_nothing(script: Script) -> None:
    script(
        """
        import importlib.metadata as metadata, importlib.util, sys
        import flash_attn_npu

        def state():
            names = {name for name in sys.modules if name.split(".")[0] == "flash_attn"}
            return list(sys.meta_path), names, set(vars(flash_attn_npu))

        before = state()
        for _ in range(2):
            with flash_attn_npu.install():
                import flash_attn.bert_padding
                assert state() != before
            assert state() == before
            assert importlib.util.find_spec("flash_attn") is None
        try:
            metadata.version("flash_attn")
        except metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError
        flash_attn_npu.uninstall()
        assert state() == before
        """
    )


def test_inner_claims_do_not_end_outer_ones(script: Script) -> None:
    script(
        """
        import sys
        import flash_attn_npu as package
        outer = package.install()
        finders = list(sys.meta_path)
        with package.install() as inner:
            assert sys.meta_path == finders
        assert package.installed()
        inner.uninstall()
        assert package.installed()
        outer.uninstall()
        assert not package.installed()

        first, second = package.install(), package.install()
        first.uninstall()
        first.uninstall()
        assert package.installed()
        package.uninstall()
        assert not package.installed()
        third = package.install()
        second.uninstall()
        assert package.installed()

        try:
            with package.install():
                raise KeyError
        except KeyError:
            pass
        third.uninstall()
        assert not package.installed()
        """
    )


def test_threads(script: Script) -> None:
    script(
        """
        import sys, threading
        import flash_attn_npu as package
        finders, start, got = list(sys.meta_path), threading.Barrier(8), []

        def work():
            start.wait()
            for _ in range(20):
                with package.install():
                    import flash_attn.bert_padding
                    got.append(flash_attn.bert_padding is package.bert_padding)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(got) == 160 and all(got)
        assert sys.meta_path == finders and "flash_attn" not in sys.modules
        """
    )


def test_a_loaded_flash_attn_is_refused_and_named(script: Script, real_flash_attn: Path) -> None:
    out = script(
        """
        import sys, types
        import flash_attn
        client = types.ModuleType("some_client")
        client.attention = flash_attn.func
        sys.modules["some_client"] = client

        import flash_attn_npu
        try:
            flash_attn_npu.install()
        except flash_attn_npu.errors.ActivationError as error:
            print(error)
        assert not flash_attn_npu.installed()
        assert sys.modules["flash_attn"] is flash_attn
        """,
        path=(real_flash_attn,),
    )
    assert str(real_flash_attn / "flash_attn" / "__init__.py") in out
    assert "__main__, some_client" in out
    assert "python -m flash_attn_npu" in out


def test_force_replaces_a_loaded_flash_attn_and_uninstall_restores_it(
    script: Script, real_flash_attn: Path
) -> None:
    out = script(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        import importlib.metadata as metadata
        import flash_attn as real, flash_attn_npu
        with flash_attn_npu.install(force=True):
            import flash_attn
            assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
            assert "flash_attn.core" not in sys.modules
            assert metadata.version("flash-attn") == flash_attn_npu.__version__
        import flash_attn
        assert flash_attn is real and sys.modules["flash_attn.core"] is real.core
        assert metadata.version("flash-attn") == "2.1.0"
        """,
        path=(real_flash_attn,),
    )
    assert "WARNING:flash_attn_npu" in out
    assert "__main__" in out


def test_a_flash_attn_on_disk_is_shadowed_and_said_once(
    script: Script, real_flash_attn: Path
) -> None:
    out = script(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, level=logging.INFO)
        import flash_attn_npu
        for _ in range(2):
            with flash_attn_npu.install():
                import flash_attn
                assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
        import flash_attn
        print("version", flash_attn.__version__)
        """,
        path=(real_flash_attn,),
    )
    assert out.count("shadowed") == 1
    assert str(real_flash_attn) in out
    assert "version 2.1.0" in out


def test_a_blocked_name_is_respected(script: Script) -> None:
    out = script(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        sys.modules["flash_attn"] = None
        import flash_attn_npu
        try:
            flash_attn_npu.install()
        except flash_attn_npu.errors.ActivationError as error:
            print("refused:", error)
        assert sys.modules["flash_attn"] is None and not flash_attn_npu.installed()
        with flash_attn_npu.install(force=True):
            import flash_attn
            assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
        assert sys.modules["flash_attn"] is None
        """
    )
    assert "refused: sys.modules['flash_attn']: got None" in out
    assert "install(force=True)" in out
    assert "WARNING:flash_attn_npu" in out


PLACEHOLDERS = {
    "bare module": "sys.modules['flash_attn'] = types.ModuleType('flash_attn')",
    "mock": "from unittest import mock; sys.modules['flash_attn'] = mock.MagicMock()",
    "dummies made from a dotted path": """
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            module = types.ModuleType(name)
            module.__file__ = "somebody.dummy_module.py"
            module.__spec__ = ModuleSpec(name, None)
            sys.modules[name] = module
        sys.modules["flash_attn"].flash_attn_interface = module
        """,
    "phantom package": """
        module = types.ModuleType("flash_attn")
        module.__path__ = []
        module.__spec__ = ModuleSpec("flash_attn", None, is_package=True)
        module.flash_attn_func = None
        sys.modules["flash_attn"] = module
        """,
    "child only": "sys.modules['flash_attn.bert_padding'] = types.ModuleType('bert_padding')",
}


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_placeholders_give_way_for_good(script: Script, placeholder: str) -> None:
    script(
        "import sys, types\nfrom importlib.machinery import ModuleSpec\n"
        + textwrap.dedent(PLACEHOLDERS[placeholder])
        + textwrap.dedent(
            """
            import flash_attn_npu
            with flash_attn_npu.install():
                import flash_attn.bert_padding, flash_attn.flash_attn_interface
                assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
                assert flash_attn.bert_padding is flash_attn_npu.bert_padding
                assert flash_attn.flash_attn_interface is flash_attn_npu.flash_attn_interface
            assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
            """
        )
    )


def test_a_second_install_evicts_placeholders_that_came_after_the_first(script: Script) -> None:
    script(
        """
        import importlib.util, sys, types
        import flash_attn_npu
        flash_attn_npu.install()
        import flash_attn
        dummy = types.ModuleType("flash_attn.flash_attention")
        sys.modules["flash_attn.flash_attention"] = flash_attn.flash_attention = dummy
        flash_attn_npu.install()
        assert "flash_attn.flash_attention" not in sys.modules
        assert not hasattr(flash_attn, "flash_attention")
        assert importlib.util.find_spec("flash_attn.flash_attention") is None

        padding = flash_attn_npu.bert_padding
        dummy = types.ModuleType("flash_attn.bert_padding")
        sys.modules["flash_attn.bert_padding"] = flash_attn.bert_padding = dummy
        flash_attn_npu.install()
        from flash_attn import bert_padding
        assert bert_padding is padding is flash_attn_npu.bert_padding

        sys.modules["flash_attn"] = types.ModuleType("flash_attn")
        flash_attn_npu.install()
        import flash_attn
        assert flash_attn.flash_attn_func is flash_attn_npu.flash_attn_func
        """
    )


def test_a_distribution_with_our_import_name_is_reported(script: Script, tmp_path: Path) -> None:
    info = tmp_path / "site" / "flash_attn_npu-0.4.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-npu\nVersion: 0.4.2\n")
    out = script(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        import flash_attn_npu
        flash_attn_npu.install()
        """,
        path=(info.parent,),
    )
    assert "flash-attn-npu 0.4.2" in out
    assert "pip uninstall flash-attn-npu" in out


def test_nothing_is_said_on_an_ordinary_install(script: Script) -> None:
    assert script("import flash_attn_npu; flash_attn_npu.install()") == ""


def test_a_failure_half_way_leaves_nothing(script: Script) -> None:
    script(
        """
        import importlib, sys
        import flash_attn_npu
        module = importlib.import_module("flash_attn_npu._activation.install")
        finders = list(sys.meta_path)

        def fail(*_):
            raise RuntimeError("half way")

        module._hooks.insert = fail
        try:
            flash_attn_npu.install()
        except RuntimeError:
            pass
        assert sys.meta_path == finders and not flash_attn_npu.installed()
        """
    )


def test_the_names_under_the_alias_are_upstreams(script: Script) -> None:
    script(
        """
        import inspect
        import flash_attn_npu
        from flash_attn_npu._activation.install import MIRRORED
        from flash_attn_npu._surface import FROZEN
        flash_attn_npu.install()
        import flash_attn
        upstream = {name for name in FROZEN["flash_attn"] if name != "__path__"}
        assert upstream <= set(dir(flash_attn))
        extra = {name for name in set(dir(flash_attn)) - upstream if not name.startswith("__")}
        submodules = {name for name in MIRRORED if name and "." not in name}
        assert extra <= submodules and inspect.ismodule(flash_attn.bert_padding)
        for name in upstream:
            assert getattr(flash_attn, name) is getattr(flash_attn_npu, name)

        import flash_attn_npu._core.kernels
        ours = set(vars(flash_attn_npu)) - upstream - submodules
        ours = {name for name in ours if not name.startswith("__")}
        assert {"errors", "install", "_core", "_activation", "_integrations"} <= ours
        for name in ours:
            assert not hasattr(flash_attn, name), name
            try:
                exec(f"from flash_attn import {name}")
            except ImportError as error:
                assert f"cannot import name {name!r} from 'flash_attn'" in str(error)
            else:
                raise AssertionError(name)

        import flash_attn.losses.cross_entropy
        assert flash_attn.losses is flash_attn_npu.losses
        """
    )


def test_why_a_module_is_absent_is_said_by_its_import_alone(script: Script) -> None:
    out = script(
        """
        import importlib, importlib.util
        import flash_attn_npu
        flash_attn_npu.install()
        for name in ("flash_attn.ops.triton.linear", "flash_attn.models.btlm", "flash_attn.cute"):
            assert importlib.util.find_spec(name) is None
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                assert error.name == name
                print(error)
        """
    )
    linear, btlm, cute = out.splitlines()
    assert linear == (
        "No module named 'flash_attn.ops.triton.linear': Triton kernels, with their launchers and "
        "tables"
    )
    assert btlm.startswith("No module named 'flash_attn.models.btlm': a model that is remote code")
    assert cute == "No module named 'flash_attn.cute'"


def test_a_finder_that_answers_first_is_named_by_the_next_install(script: Script) -> None:
    out = script(
        """
        import importlib.abc, importlib.machinery, logging, sys
        logging.basicConfig(stream=sys.stdout)
        import flash_attn_npu

        class Rival(importlib.abc.MetaPathFinder):
            def __repr__(self):
                return "a rival of ours"
            def find_spec(self, name, path=None, target=None):
                if name == "flash_attn":
                    return importlib.machinery.ModuleSpec(name, None)

        class Refusing(Rival):
            def __repr__(self):
                return "one that refuses"
            def find_spec(self, name, path=None, target=None):
                if name == "flash_attn":
                    raise ImportError("not here")

        flash_attn_npu.install()
        sys.meta_path.insert(0, importlib.machinery.BuiltinImporter)
        flash_attn_npu.install()
        print("nothing before us")
        sys.meta_path[:0] = [Rival(), Refusing()]
        flash_attn_npu.install()
        print("and again")
        del sys.meta_path[:2]
        flash_attn_npu.install()
        """
    )
    first, second = out.split("nothing before us\n")
    said, nothing = second.split("and again\n")
    assert (first, nothing) == ("", "")
    assert said.startswith("WARNING:flash_attn_npu:`import flash_attn` does not ask")
    assert "a rival of ours, one that refuses; take them out" in said


def test_clients_that_came_too_early_are_named(script: Script, tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    (clients / "diffusers" / "utils").mkdir(parents=True)
    for package in ("diffusers", "diffusers/utils"):
        (clients / package / "__init__.py").write_text("")
    (clients / "diffusers" / "utils" / "import_utils.py").write_text(
        "import importlib.util\n"
        "_flash_attn_available = importlib.util.find_spec('flash_attn') is not None\n"
    )
    (clients / "model.py").write_text(
        "try:\n    from flash_attn import flash_attn_func\n"
        "except ImportError:\n    flash_attn_func = None\n"
    )
    program = """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        import flash_attn_npu
        {}
        import diffusers.utils.import_utils, model
        {}
        """
    early = script(program.format("", "flash_attn_npu.install()"), path=(clients,))
    assert early.startswith("WARNING:flash_attn_npu:imported before install()")
    assert "without it: diffusers.utils.import_utils, model; call" in early
    assert "python -m flash_attn_npu" in early
    assert script(program.format("flash_attn_npu.install()", ""), path=(clients,)) == ""


LAZY = """
import importlib.util, sys

def lazy(name):
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def asleep(module):
    return type(module).__name__ == "_LazyModule"
"""


def test_lazy_modules_are_left_asleep(script: Script, real_flash_attn: Path) -> None:
    (real_flash_attn / "failing.py").write_text("raise RuntimeError('touched')\n")
    (real_flash_attn / "flash_attn" / "__init__.py").write_text("raise RuntimeError('touched')\n")
    script(
        LAZY
        + textwrap.dedent(
            """
            import flash_attn_npu
            from flash_attn_npu.errors import ActivationError
            failing = lazy("failing")
            flash_attn_npu.install().uninstall()
            real = lazy("flash_attn")
            try:
                flash_attn_npu.install()
            except ActivationError as error:
                assert "elsewhere" in str(error)
            else:
                raise AssertionError
            with flash_attn_npu.install(force=True):
                import flash_attn
                assert flash_attn is not real
            assert sys.modules["flash_attn"] is real
            assert asleep(failing) and asleep(real)
            """
        ),
        path=(real_flash_attn,),
    )


def test_what_was_set_aside_comes_back_once(script: Script, real_flash_attn: Path) -> None:
    script(
        """
        import sys
        import flash_attn, flash_attn_npu
        flash_attn_npu.install(force=True).uninstall()
        assert sys.modules.pop("flash_attn") is flash_attn
        del sys.modules["flash_attn.core"]
        flash_attn_npu.install().uninstall()
        assert not [name for name in sys.modules if name.startswith("flash_attn.")]
        assert "flash_attn" not in sys.modules
        """,
        path=(real_flash_attn,),
    )


def test_what_took_the_name_meanwhile_keeps_it(script: Script, real_flash_attn: Path) -> None:
    script(
        """
        import importlib, sys, types
        import flash_attn as first, flash_attn_npu
        module = importlib.import_module("flash_attn_npu._activation.install")
        flash_attn_npu.install(force=True)
        restore = module._restore
        module._restore = lambda: 1 / 0
        try:
            flash_attn_npu.uninstall()
        except ZeroDivisionError:
            module._restore = restore
        assert not flash_attn_npu.installed() and "flash_attn" not in sys.modules
        sys.modules["flash_attn"] = second = types.ModuleType("flash_attn")
        flash_attn_npu.uninstall()
        assert sys.modules["flash_attn"] is second and second is not first
        # a child of the first beside it would be half of each
        assert "flash_attn.core" not in sys.modules
        """,
        path=(real_flash_attn,),
    )


def test_a_finder_that_refuses_the_name_loses_nothing(
    script: Script, real_flash_attn: Path
) -> None:
    script(
        """
        import importlib.abc, sys
        import flash_attn, flash_attn_npu

        class Refusing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "flash_attn":
                    raise RuntimeError("no")

        def state():
            return list(sys.meta_path), {
                name: module for name, module in sys.modules.items() if "flash_attn." in f"{name}."
            }

        sys.meta_path.insert(0, Refusing())
        before = state()
        try:
            flash_attn_npu.install(force=True)
        except RuntimeError:
            pass
        else:
            raise AssertionError
        assert not flash_attn_npu.installed() and state() == before
        """,
        path=(real_flash_attn,),
    )

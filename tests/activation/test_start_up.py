"""The start-up hook on every Python at hand, before a package that needs no torch.

A stand-in for flash_attn_npu lies beside the real hook, so that only the hook is tested here.
"""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest

from flash_attn_npu import _startup as hook
from flash_attn_npu._commands.environment import STARTER
from flash_attn_npu._integrations import transformers
from tests.helpers.environments import PACKAGING, ROOT, START_FILES, Environment, pythons

PYTHONS = pythons()

STAND_IN = """
import sys
from . import _startup as hook
sys.meta_path.remove(hook.waiting())
sys.modules["flash_attn"] = sys.modules[__name__]
flash_attn_func = "ours"
"""

ASKS = """
import importlib.metadata as metadata, importlib.util, sys
before = set(sys.modules)
found = [importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface", "flash")]
print(*[spec and spec.origin.split("site-packages")[-1] for spec in found])
try:
    print(metadata.version("flash_attn"), metadata.packages_distributions()["flash_attn"])
except (metadata.PackageNotFoundError, KeyError):
    print("no distribution")
print("imported" if "flash_attn_npu" in sys.modules else "not imported")
try:
    import flash_attn
    print(flash_attn.flash_attn_func, sys.modules["flash_attn_npu"] is flash_attn)
except ModuleNotFoundError as error:
    print(error)
"""

CHILDREN = """
import multiprocessing, os, subprocess, sys
def told(_):
    import flash_attn
    return flash_attn.flash_attn_func
if __name__ == "__main__":
    os.environ["FLASH_ATTN_NPU_INSTALL"] = "1"
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.map(told, [0]))
    code = "import flash_attn; print(flash_attn.flash_attn_func)"
    for flags in ((), ("-I",), ("-E",)):
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
        print(*flags, done.stdout.strip())
    sys.stdout.flush()
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ), 0)
"""


def lay(environment: Environment) -> None:
    """The hook as the wheel lays it, and the stand-in."""
    package = environment.site / "flash_attn_npu"
    (package / "_activation").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    for name in ("_startup.py", "_activation/distribution.py"):
        shutil.copy(ROOT / "flash_attn_npu" / name, package / name)
    for name in START_FILES:
        shutil.copy(ROOT / PACKAGING / name, environment.site)


@pytest.fixture(scope="module", params=PYTHONS)
def anywhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("start"), PYTHONS[request.param])
    lay(environment)
    return environment


@pytest.fixture
def here(tmp_path: Path) -> Environment:
    environment = Environment(tmp_path)
    lay(environment)
    return environment


def test_it_waits_where_the_variable_is_set(anywhere: Environment) -> None:
    promised = "/flash_attn_npu/__init__.py"
    version = "2.8.3 ['flash-attn']\nnot imported\nours True\n"
    assert anywhere.says("-c", ASKS, variable="1") == f"{promised} None None\n{version}"
    with_3 = f"{promised} /flash_attn_npu/_flash_attn_3/flash_attn_interface.py None\n{version}"
    assert anywhere.says("-c", ASKS, variable="1,fa3") == with_3


def test_nothing_is_loaded_without_it(anywhere: Environment) -> None:
    code = "import sys; print(sorted(sys.modules), [type(f).__name__ for f in sys.meta_path])"
    bare = anywhere.says("-S", "-c", code)
    assert "flash_attn_npu" not in anywhere.says("-c", code)
    for value in ("", "0"):
        assert "Waiting" not in anywhere.says("-c", code, variable=value)
    # two modules of ours, and nothing that Python has not loaded itself
    loaded = set(eval(anywhere.says("-c", code, variable="1").partition("] [")[0] + "]"))
    plain = set(eval(anywhere.says("-c", code).partition("] [")[0] + "]"))
    assert loaded - plain <= {STARTER, hook.__name__, "__future__"}
    assert "Waiting" not in bare


def test_every_way_to_start_a_child(anywhere: Environment) -> None:
    (anywhere.folder / "children.py").write_text(CHILDREN)
    said = anywhere.says("children.py").splitlines()
    assert said == ["spawn ['ours']", "forkserver ['ours']", "ours", "-I ours", "-E ours", "ours"]


def test_a_wrong_word_is_one_line_and_serves_nothing(here: Environment) -> None:
    done = here.run("-c", ASKS, variable="yes")
    assert done.returncode == 0
    assert done.stderr == (
        "flash_attn_npu: flash_attn is not served: FLASH_ATTN_NPU_INSTALL is 'yes'; allowed: 0, or "
        "some of 1, fa3, force joined by commas\n"
    )
    assert "No module named 'flash_attn'" in done.stdout


def test_a_removed_package_is_not_missed(here: Environment) -> None:
    shutil.rmtree(here.site / "flash_attn_npu")
    gone = "None None None\nno distribution\nnot imported\nNo module named 'flash_attn'\n"
    assert here.says("-c", ASKS, variable="1,force") == gone
    (here.site / START_FILES[0]).unlink()
    assert here.says("-c", ASKS, variable="1") == gone


def test_a_real_flash_attn_keeps_its_name_unless_told(here: Environment) -> None:
    real = here.folder / "flash_attn"
    real.mkdir()
    (real / "__init__.py").write_text(
        "flash_attn_func = 'real'\nimport sys\nsys.modules.setdefault('flash_attn_npu', None)\n"
    )
    code = "import flash_attn; print(flash_attn.flash_attn_func)"
    assert here.says("-c", code, variable="1") == "real\n"
    assert here.says("-c", code, variable="force") == "ours\n"
    client = here.folder / "transformers"
    client.mkdir()
    for name in ("__init__", "modeling_utils"):
        (client / f"{name}.py").touch()
    code = "import sys, transformers.modeling_utils; print('flash_attn_npu' in sys.modules)"
    assert here.says("-c", code, variable="1") == "False\n"
    shutil.rmtree(real)
    assert here.says("-c", code, variable="1") == "True\n"


def test_a_thousand_starts_do_not_add_up(here: Environment) -> None:
    """The line of the `.pth` file calls nothing but a look into the environment."""
    line = (ROOT / PACKAGING / START_FILES[1]).read_text()
    code = textwrap.dedent(
        f"""
        import sys
        called = []
        sys.setprofile(lambda frame, event, arg: called.append(event))
        exec({line!r})
        sys.setprofile(None)
        print(len(called))
        """
    )
    assert int(here.says("-c", code)) < 30


def test_the_hook_knows_what_the_package_does() -> None:
    assert {name.partition(".")[0] for name in transformers.HOOKS} == set(hook.CLIENTS)
    assert (ROOT / PACKAGING / START_FILES[2]).read_text() == f"{STARTER}:start\n"

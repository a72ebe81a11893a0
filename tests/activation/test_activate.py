"""activate and deactivate: what pip, Python and type checkers see, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flash_attn_npu import _startup as startup
from flash_attn_npu._activation.install import MIRRORED
from flash_attn_npu._activation.names import NAMES
from flash_attn_npu._commands import environment as command
from flash_attn_npu._commands.environment import Place
from flash_attn_npu.errors import ActivationError
from tests.helpers.environments import START_FILES, Environment, build_wheel


def tree(site: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with its content; None for a folder."""
    return {
        str(path.relative_to(site)): None if path.is_dir() else path.read_bytes()
        for path in sorted(site.rglob("*"))
    }


def install_info(site: Path, name: str, version: str, requires: str = "") -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text + (f"Requires-Dist: {requires}\n" if requires else ""))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Site-packages in which the distribution is installed, as far as anybody looks."""
    site = tmp_path / "site"
    install_info(site, startup.PROVIDER, "0.1.0")
    return Place(site, (str(site),))


def consistent(place: Place) -> bool:
    """Whether the environment serves flash_attn; the same for pip as for the interpreter."""
    on = command.activated(place)
    assert (place.distribution("flash-attn") is not None) == on
    if on:
        assert (place.site / f"{command.START}.pth").exists()
        assert (place.site / command.STUBS / "__init__.pyi").exists()
        for line in (place.site / startup.INFO / "RECORD").read_text().splitlines():
            assert (place.site / line.split(",")[0]).exists(), line
    return on


def test_there_and_back(place: Place) -> None:
    before = tree(place.site)
    assert not consistent(place)
    assert command.activate(place)
    during = tree(place.site)
    assert consistent(place)
    assert not command.activate(place)
    assert tree(place.site) == during
    assert command.deactivate(place)
    assert tree(place.site) == before
    assert not command.deactivate(place)
    assert tree(place.site) == before


def test_every_file_is_recorded(place: Place) -> None:
    before = tree(place.site)
    command.activate(place)
    recorded = set()
    for line in (place.site / startup.INFO / "RECORD").read_text().splitlines():
        name, digest, size = line.split(",")
        recorded.add(name)
        if digest:
            content = (place.site / name).read_bytes()
            assert command._line(name, content) == f"{line}\n"
            assert int(size) == len(content)
    added = {name for name, content in tree(place.site).items() if content is not None} - set(
        before
    )
    assert recorded == added


def test_stubs_name_what_is_mirrored(place: Place) -> None:
    command.activate(place)
    stubs = place.site / command.STUBS
    found = {str(path.relative_to(stubs).with_suffix("")) for path in stubs.rglob("*.pyi")}
    names = {name.removesuffix("__init__").rstrip("/").replace("/", ".") for name in found}
    assert names == set(MIRRORED)
    top = (stubs / "__init__.pyi").read_text()
    assert all(f"{name} as {name}" in top for name in NAMES)
    assert (
        stubs / "ops" / "rms_norm.pyi"
    ).read_text() == "from flash_attn_npu.ops.rms_norm import *\n"


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a distribution": (lambda site: install_info(site, "flash-attn", "2.7.4"), "flash-attn 2.7.4"),
    "a module": (lambda site: (site / "flash_attn.py").touch(), "flash_attn.py"),
    "MinghuasLab's": (
        lambda site: install_info(site, "flash-attn-npu", "0.4"),
        "flash-attn-npu 0.4",
    ),
    "stubs": (lambda site: (site / "flash_attn-stubs").mkdir(), "stubs of somebody else"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_and_named(place: Place, name: str) -> None:
    prepare, told = REFUSED[name]
    prepare(place.site)
    before = tree(place.site)
    with pytest.raises(ActivationError, match=told):
        command.activate(place)
    assert tree(place.site) == before


def test_a_checkout_on_pythonpath_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ActivationError, match="pip install it first"):
        command.activate(Place(tmp_path, (str(tmp_path),)))
    assert tree(tmp_path) == {}


def test_a_read_only_site_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for function in (command.activate, command.deactivate):
        with pytest.raises(ActivationError, match="cannot be written to"):
            function(place)


def test_a_failing_write_is_explained_and_leaves_nothing_that_counts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(place.site)

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ActivationError, match="No space left"):
            command.activate(place)
    assert not consistent(place)
    command.deactivate(place)
    assert tree(place.site) == before


@contextmanager
def in_a_fork() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch has threads; the child touches files only
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def killed_at(step: int, function: Callable[[Place], bool], place: Place) -> bool:
    """Run in a fork that kills itself before its `step`-th change of files; whether it did."""
    with in_a_fork():
        child = os.fork()
    if child == 0:
        left = step

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            changes = event in (
                "os.mkdir",
                "os.rename",
                "os.remove",
                "os.rmdir",
                "tempfile.mkdtemp",
            )
            if changes or (event == "open" and arguments[1] == "w"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            function(place)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_every_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [f"{command.STUBS}/{name}" for name in (startup.MARK, "__init__.pyi", "ops/x.pyi")]
    monkeypatch.setattr(command, "_stubs", lambda: dict.fromkeys(few, ""))
    before = tree(place.site)
    states = []
    for step in range(1000):
        more = killed_at(step, command.activate, place)
        states.append(consistent(place))
        again = step % 2 == 0
        assert not again or command.activate(place) != states[-1]
        assert command.deactivate(place) == (again or states[-1])
        assert tree(place.site) == before, step
        if not more:
            break
    assert step > 15
    # nothing counts until the last moments, and then everything does
    assert states == sorted(states)
    states = []
    for step in range(1000):
        command.activate(place)
        more = killed_at(step, command.deactivate, place)
        states.append(consistent(place))
        assert command.deactivate(place) == states[-1]
        assert tree(place.site) == before, step
        if not more:
            break
    assert step > 5
    assert states == sorted(states, reverse=True)


def test_two_at_once(place: Place) -> None:
    before = tree(place.site)
    for functions in ([command.activate] * 4, [command.activate, command.deactivate] * 3):
        children = []
        for function in functions:
            with in_a_fork():
                child = os.fork()
            if child == 0:
                try:
                    os._exit(int(function(place)))
                except BaseException:
                    os._exit(100)
            children.append(child)
        results = [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]
        assert set(results) <= {0, 1}, results
        on = consistent(place)
        if functions == [command.activate] * 4:
            assert on
            assert sum(results) == 1
        command.deactivate(place)
        assert tree(place.site) == before


def pip(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", str(environment.python), *arguments]
    # Python's own caches of what a start loads are nobody's to take away
    quiet = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    quiet["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=quiet, cwd=environment.folder
    )


def consumer(folder: Path) -> Path:
    """A wheel that requires flash-attn."""
    wheel = folder / "consumer-1.0-py3-none-any.whl"
    info = "consumer-1.0.dist-info"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: consumer\nVersion: 1.0\n"
        "Requires-Dist: flash-attn>=2.5\n",
        f"{info}/WHEEL": command.WHEEL,
    }
    files[f"{info}/RECORD"] = "".join(command._line(n, t.encode()) for n, t in files.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def test_pip_and_python_see_it(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.unpack(build_wheel(tmp_path))
    here = Place(environment.site, (str(environment.site),))
    before = tree(environment.site)
    assert before.keys() >= {*START_FILES, "flash_attn_npu/_startup.py"}
    assert "flash_attn_npu/_packaging" not in before
    command.activate(here)
    wheel = str(consumer(tmp_path))
    # our own requirements are not here, and pip looks nowhere
    install = ("install", "--no-index", "--no-deps")
    assert pip(environment, *install, wheel).returncode == 0
    said = pip(environment, "check").stdout
    assert "consumer" not in said
    assert "flash-attn 2.8.3" not in said
    assert "flash-attn" in pip(environment, "list", "--format=freeze").stdout
    resolved = pip(
        environment, "install", "--no-index", "--dry-run", "flash-attn>=2.5", "--no-deps"
    )
    assert "already satisfied: flash-attn>=2.5" in resolved.stdout

    asks = (
        "import importlib.metadata as m, importlib.util, sys;"
        "print(m.version('flash_attn'), m.packages_distributions()['flash_attn'],"
        "importlib.util.find_spec('flash_attn') is not None, 'torch' in sys.modules)"
    )
    assert environment.says("-c", asks) == "2.8.3 ['flash-attn'] True False\n"
    off = environment.run("-c", "import flash_attn", variable="0")
    assert "No module named 'flash_attn'" in off.stderr

    assert pip(environment, "uninstall", "-y", "consumer").returncode == 0
    assert tree(environment.site).keys() - before.keys()
    assert pip(environment, "uninstall", "-y", "flash-attn").returncode == 0
    assert tree(environment.site) == before
    assert environment.run("-c", "import flash_attn").returncode == 1


def test_the_commands_and_what_is_served_between_them(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.see_packages_of_the_tests()
    environment.unpack(build_wheel(tmp_path))
    before = tree(environment.site)
    ours = ("-m", "flash_attn_npu")
    assert environment.run(*ours, "status").returncode == 1
    assert environment.says(*ours, "activate").startswith("activated: ")
    assert environment.says(*ours, "activate").startswith("nothing to do: ")
    said = environment.says(*ours, "status")
    assert "2.8.3, by flash-attn-npu-shim" in said
    assert "children          follow" in said
    assert "import flash_attn gives flash_attn_npu" in said
    asks = (
        "import flash_attn, flash_attn_npu, importlib.metadata as m;"
        "print(flash_attn.flash_attn_func.__module__, flash_attn_npu.installed(),"
        "m.packages_distributions()['flash_attn']); flash_attn_npu.uninstall();"
        "import importlib.util; print(importlib.util.find_spec('flash_attn'))"
    )
    assert environment.says("-c", asks) == (
        "flash_attn_npu.flash_attn_interface True ['flash-attn']\nNone\n"
    )
    assert environment.says(*ours, "deactivate").startswith("deactivated: ")
    assert tree(environment.site) == before
    (environment.site / "flash_attn.py").touch()
    refused = environment.run(*ours, "activate")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: flash_attn: got a flash_attn that is installed already"
    )


def test_the_place_of_this_interpreter() -> None:
    assert Place.here().site == Path(sysconfig.get_path("purelib"))
    assert Place.here().path == tuple(sys.path)

"""Make an environment serve flash_attn for good, visible to pip, and undo it.

Everything is laid ready in a folder of its own first. The folder of metadata is moved into place
last and away first, and start-up code looks for a file in it: so there is one moment at which the
environment changes, whoever is interrupted. What a killed run leaves is inert, and the next run of
any of these takes it away.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from .. import _startup as startup
from ..errors import ActivationError

__all__ = ["Place", "activate", "activated", "deactivate", "facts", "reported"]

NAME = "flash-attn"
RIVAL = "flash-attn-npu"
STUBS = f"{startup.ALIAS}-stubs"
START = "_zz_flash_attn_npu_activated"
STARTER = "_flash_attn_npu_startup"
HOOK = "_zz_flash_attn_npu.pth"
ASIDE = ".flash_attn_npu_"
"""How the folders begin in which things are made ready, or taken away."""

PTH = (
    f'import os; exec("try:\\n import {STARTER}\\nexcept ImportError: pass\\n'
    f'else: {STARTER}.start_activated()")\n'
)
METADATA = f"""\
Metadata-Version: 2.1
Name: {NAME}
Version: {startup.FLASH_ATTN_VERSION}
Summary: served by {startup.PROVIDER}, which `flash-attn-npu activate` made permanent here
Requires-Dist: {startup.PROVIDER}
"""
WHEEL = f"""\
Wheel-Version: 1.0
Generator: {startup.PROVIDER}
Root-Is-Purelib: true
Tag: py3-none-any
"""


class Place(NamedTuple):
    """An environment: its site-packages, and where its interpreter looks for modules."""

    site: Path
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> Place:
        """That of this interpreter."""
        return cls(Path(sysconfig.get_path("purelib")), tuple(sys.path))

    def distribution(self, name: str) -> metadata.Distribution | None:
        """What is installed under a name, on disk."""
        # with a path, only what lies there is found
        found = metadata.Distribution.discover(name=name, path=list(self.path))
        return next(iter(found), None)


def activated(place: Place) -> bool:
    """Whether the environment serves flash_attn without being asked."""
    return (place.site / startup.INFO / startup.MARK).exists()


def activate(place: Place) -> bool:
    """Make the environment serve flash_attn; whether there was anything to do.

    Raises:
        ActivationError: somebody else's flash-attn is there, or nothing may be written.
    """
    with _alone(place):
        if activated(place):
            return False
        _take_away_rests(place)
        _refuse_others(place)
        ready = _aside(place)
        files = {**_stubs(), f"{START}.pth": PTH, f"{START}.start": _entry_point()}
        files |= _info(files)
        for name, text in files.items():
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            (ready / name).write_text(text, encoding="utf-8")
        for name in (f"{START}.pth", f"{START}.start", STUBS, startup.INFO):
            os.rename(ready / name, place.site / name)
        ready.rmdir()
        return True


def deactivate(place: Place) -> bool:
    """Undo it, to the byte; whether there was anything to do.

    Raises:
        ActivationError: nothing may be written there.
    """
    with _alone(place):
        was = activated(place)
        if was:
            os.rename(place.site / startup.INFO, _aside(place) / startup.INFO)
        _take_away_rests(place)
        return was


def facts(place: Place) -> list[str]:
    """What decides who answers to flash_attn, a line each."""
    found = place.distribution(NAME)
    module = PathFinder.find_spec(startup.ALIAS, list(place.path))
    served = startup.PACKAGE if activated(place) else "nothing"
    hooks = [folder for folder in place.path if os.path.exists(os.path.join(folder, HOOK))]
    return [
        f"site-packages     {place.site}",
        f"activated         {'yes' if activated(place) else 'no'}",
        f"{NAME}        {f'{found.version}, by {_installer(found)}' if found else 'not installed'}",
        f"import flash_attn gives {module.origin if module and module.loader else served}",
        f"children          {f'follow, by {HOOK} in {hooks[0]}' if hooks else 'do not follow'}",
        f"{startup.VARIABLE} {os.environ.get(startup.VARIABLE, 'not set')}",
    ]


def reported(act: Callable[[], bool], done: str, before: str) -> int:
    """Act, print what was done, and return the exit status."""
    try:
        print(done if act() else before)
    except ActivationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _installer(found: metadata.Distribution) -> str:
    return (found.read_text("INSTALLER") or "somebody").strip()


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Wait for others at work in the same folder, which is itself what is locked."""
    # Windows has none
    import fcntl

    if not os.access(place.site, os.W_OK):
        raise ActivationError(
            str(place.site),
            "a folder that cannot be written to",
            "a site-packages of your own",
            "make a virtual environment, or start programs with `python -m flash_attn_npu`",
        )
    folder = os.open(place.site, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise ActivationError(
            str(place.site), error, "a site-packages that can be written to", "see the reason"
        ) from error
    finally:
        os.close(folder)


def _aside(place: Place) -> Path:
    return Path(tempfile.mkdtemp(prefix=ASIDE, dir=place.site))


def _take_away_rests(place: Place) -> None:
    """Remove what is ours without the metadata that would make it count."""
    for suffix in (".pth", ".start"):
        (place.site / f"{START}{suffix}").unlink(missing_ok=True)
    if (place.site / STUBS / startup.MARK).exists():
        # at once, or half of them might be taken for somebody else's
        os.rename(place.site / STUBS, _aside(place) / STUBS)
    for rest in place.site.glob(f"{ASIDE}*"):
        shutil.rmtree(rest)


def _refuse_others(place: Place) -> None:
    other = place.distribution(NAME)
    module = PathFinder.find_spec(startup.ALIAS, list(place.path))
    if other is not None or (module is not None and module.loader is not None):
        came = f"at {module.origin}" if other is None and module else f"{NAME} {_version(other)}"
        raise ActivationError(
            startup.ALIAS,
            f"a flash_attn that is installed already, {came}",
            "an environment without one",
            f"pip uninstall {NAME}, or shadow it in one program: `python -m flash_attn_npu`",
        )
    rival = place.distribution(RIVAL)
    if rival is not None:
        raise ActivationError(
            startup.PACKAGE,
            f"the distribution {RIVAL} {_version(rival)}, whose import package has our name",
            "an environment without it",
            f"pip uninstall {RIVAL}, then pip install --force-reinstall --no-deps "
            f"{startup.PROVIDER}",
        )
    if place.distribution(startup.PROVIDER) is None:
        raise ActivationError(
            startup.PACKAGE,
            "a package that was imported from PYTHONPATH or the current folder",
            f"the distribution {startup.PROVIDER}, installed in this environment",
            "pip install it first: new interpreters would not find it",
        )
    if os.path.lexists(place.site / STUBS):
        raise ActivationError(
            STUBS,
            f"stubs of somebody else in {place.site}",
            "no such folder",
            f"uninstall what brought {STUBS}",
        )


def _version(found: metadata.Distribution | None) -> str:
    return "" if found is None else found.version


def _entry_point() -> str:
    return f"{STARTER}:start_activated\n"


def _stubs() -> dict[str, str]:
    """What type checkers read for flash_attn: that its names are ours."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    modules = startup.light("_activation", "mirrored").mirrored([package], own=("errors",))
    names = startup.light("_activation", "names").NAMES
    stubs = {f"{STUBS}/{startup.MARK}": ""}
    for module in modules:
        folder = os.path.isdir(os.path.join(package, *module.split(".")))
        file = "/".join(filter(None, [*module.split("."), "__init__" if folder else ""]))
        ours = f"{startup.PACKAGE}.{module}".rstrip(".")
        shown = "*" if module else ", ".join(f"{name} as {name}" for name in names)
        stubs[f"{STUBS}/{file}.pyi"] = f"from {ours} import {shown}\n"
    return stubs


def _info(files: dict[str, str]) -> dict[str, str]:
    """Metadata of flash-attn that own `files`."""
    info = {
        "METADATA": METADATA,
        "WHEEL": WHEEL,
        "INSTALLER": f"{startup.PROVIDER}\n",
        "top_level.txt": f"{startup.ALIAS}\n",
        startup.MARK: "",
    }
    info = {f"{startup.INFO}/{name}": text for name, text in info.items()}
    record = f"{startup.INFO}/RECORD"
    lines = [_line(name, text.encode()) for name, text in (files | info).items()]
    return {**info, record: "".join([*lines, f"{record},,\n"])}


def _line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"

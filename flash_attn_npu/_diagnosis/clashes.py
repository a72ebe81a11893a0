"""What does not fit together, and a line each on how to mend it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from .._core.ground.variables import unread
from .._startup import OFF, PACKAGE, PROVIDER, VARIABLE, WORDS
from .._version import OLDEST_TORCH_NPU
from ..errors import printable
from . import installed, settings
from .probe import START, Probed

__all__ = ["Clash", "clashes"]

RIVAL = "flash-attn-npu"
CONTAINER = "a container of CANN (quay.io/ascend/cann) with torch_npu"


class Clash(NamedTuple):
    """fatal: attention cannot be fused because of it."""

    what: str
    mend: str
    fatal: bool = False


def clashes(probed: Probed) -> list[Clash]:
    """Everything that was found, the gravest first."""
    found = [*_of_versions(), *_of_imports(probed), *_of_packages(), *_of_this_process()]
    wrong = settings.illegal()
    if wrong:
        found.append(Clash(f"a setting is not legal: {wrong}", "unset or correct it", fatal=True))
    told = os.environ.get(VARIABLE, "")
    if told not in OFF and not set(told.split(",")) <= set(WORDS):
        what = f"{VARIABLE} is {printable(told)!r}: new interpreters do not serve flash_attn"
        found.append(Clash(what, f"write 0, or some of {', '.join(WORDS)} joined by commas"))
    for name, meant in unread().items():
        what = f"{printable(name)} is set in the environment, and nothing reads it"
        found.append(Clash(what, f"write {meant}, or unset it"))
    return sorted(found, key=lambda clash: not clash.fatal)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, installed.release(version)))


def _of_versions() -> Iterator[Clash]:
    torch, torch_npu = installed.version("torch"), installed.version("torch_npu")
    there, driver = installed.cann(), installed.driver()
    if torch and torch_npu and installed.release(torch) != installed.release(torch_npu):
        belongs, other = (".".join(installed.release(x)) for x in (torch_npu, torch))
        yield Clash(
            f"torch_npu {torch_npu} does not belong to torch {torch}",
            f"pip install torch=={belongs}, or torch_npu=={other}",
            fatal=True,
        )
    if torch_npu and () < _numbers(torch_npu) < _numbers(OLDEST_TORCH_NPU):
        yield Clash(
            f"torch_npu {torch_npu} is older than {OLDEST_TORCH_NPU}, the oldest that is supported",
            f"use a torch of {OLDEST_TORCH_NPU} or newer and its torch_npu; until then all is "
            "composed",
            fatal=True,
        )
    if torch_npu is None:
        if driver or installed.cards():
            wanted = ".".join(installed.release(torch)) if torch else "the version of your torch"
            yield Clash(
                "there is an NPU driver, but no torch_npu",
                f"pip install torch_npu=={wanted}",
                fatal=True,
            )
        return
    if there is None:
        yield Clash(
            "torch_npu is installed, but no CANN is found",
            f"use {CONTAINER}, or install the CANN that your torch_npu names",
            fatal=True,
        )
    elif not there.sourced:
        yield Clash(
            f"CANN {there.version or 'of unknown version'} is installed, but not sourced",
            f"source {there.script}",
            fatal=True,
        )


def _of_imports(probed: Probed) -> Iterator[Clash]:
    if probed.failed is None:
        card = probed.facts.get("card")
        if card is not None and not card["count"]:
            yield Clash(
                "torch_npu sees no card",
                "see what `npu-smi info` shows; in a container pass --device /dev/davinci0 and "
                "its like; look at ASCEND_RT_VISIBLE_DEVICES",
                fatal=True,
            )
        return
    what = f"{_WHAT.get(probed.failed, probed.failed)}: {probed.why}"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        what = what.replace(", and as torch loads it, nor can torch", "")
    mend = _MEND.get(probed.failed, "send this page to us")
    yield Clash(what, mend, fatal=probed.failed != "clients")


_WHAT = {
    START: "nothing could be imported, as the child process that was to do it failed",
    "torch": "torch cannot be imported",
    "torch_npu": "torch_npu cannot be imported, and as torch loads it, nor can torch",
    "card": "the card does not answer",
    "operators": "the operators of torch_npu cannot be read",
    "attention": "a small call of flash_attn_varlen_func failed",
    "clients": "transformers cannot be asked",
}
_MEND = {
    START: "see the reason: this Python must be able to start another, as sys.executable names it",
    "torch": "pip install --force-reinstall torch, of the version that your torch_npu names",
    "torch_npu": "mend what is named here; to use torch on the CPU meanwhile: "
    "export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    "card": "see what `npu-smi info` shows, and whether another process holds the card",
    "attention": "send this page to us, with what `flash-attn-npu validate --quick` writes",
    "clients": "pip install --upgrade transformers",
}


def _of_packages() -> Iterator[Clash]:
    rival = installed.version(RIVAL)
    if rival:
        yield Clash(
            f"{RIVAL} {rival} (MinghuasLab's) is installed too, and brings a package "
            f"{PACKAGE} as well: whichever came last has overwritten files of the other",
            f"pip uninstall {RIVAL}, then pip install --force-reinstall --no-deps {PROVIDER}",
        )
    folders = installed.copies(PACKAGE)
    if len(folders) > 1:
        yield Clash(
            f"{PACKAGE} is on the path {len(folders)} times; the first is used: "
            f"{', '.join(folders)}",
            "uninstall one of them, or start Python in another folder",
        )
    flash_attn = installed.where("flash_attn")
    if flash_attn and not _activated():
        number = installed.version("flash_attn")
        yield Clash(
            f"a flash_attn {number or 'without metadata, which may be a stub,'} lies at "
            f"{flash_attn}",
            "install() and the launcher shadow it; elsewhere it is found first: "
            "pip uninstall flash-attn, or remove the folder, if it is not wanted",
        )
    if installed.where("mindspeed"):
        yield Clash(
            "MindSpeed puts dummies under the name flash_attn when it is imported",
            "call flash_attn_npu.install() after `import mindspeed.megatron_adaptor`",
        )


def _activated() -> bool:
    """Whether the metadata of flash-attn is what `activate` wrote."""
    try:
        fields = metadata.distribution("flash_attn").metadata
    except metadata.PackageNotFoundError:
        return False
    # a field that is not there is a warning from Python 3.12 on, and will be an error
    return "Summary" in fields and PROVIDER in fields["Summary"]


def _of_this_process() -> Iterator[Clash]:
    if "flash_attn" not in sys.modules:
        return
    module = sys.modules["flash_attn"]
    if module is None:
        yield Clash(
            "sys.modules['flash_attn'] is None: somebody in this process blocked the name",
            "delete the entry, or call install(force=True)",
        )
        return
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    file = str(getattr(module, "__file__", None))
    if loader is None or not hasattr(module, "__path__"):
        yield Clash(
            f"a placeholder is loaded as flash_attn, from {file}",
            "flash_attn_npu.install() removes it: call it after whoever put it there",
        )
    elif PACKAGE not in file:
        yield Clash(
            f"another flash_attn is loaded, from {file}",
            "call flash_attn_npu.install() before anything imports flash_attn, or start the "
            "program with flash-attn-npu",
        )

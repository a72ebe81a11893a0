"""The page that doctor prints: facts, what clashes, and whether attention would be fused."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .._core.ground import confirmed
from .._core.ground.confirmed import Combination
from .._startup import PROVIDER
from .._version import FLASH_ATTN_VERSION
from . import installed, settings
from .clashes import Clash, clashes
from .clients import Client, clients
from .probe import Probed, probe

__all__ = ["Page", "doctor"]

FUSED = ("npu_fusion_attention", "npu_fused_infer_attention_score")


@dataclass(frozen=True)
class Page:
    """What doctor found; `str()` of it is the page, `as_json()` the same as data."""

    versions: dict[str, str]
    probed: Probed
    clashes: list[Clash]
    clients: list[Client]
    settings: list[settings.Setting]
    combination: Combination | None
    simulated: bool

    @property
    def fused(self) -> bool:
        """Whether plain attention would be served by a fused kernel of an NPU."""
        served = self.probed.facts.get("attention") or {}
        return bool(served.get("kernel") in FUSED and served.get("finite"))

    def as_json(self) -> dict[str, Any]:
        """The page as plain data."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("clashes", "clients", "settings"):
            plain[name] = [entry._asdict() for entry in plain[name]]
        plain["probed"] = self.probed._asdict()
        plain["combination"] = self.combination._asdict() if self.combination else None
        return {**plain, "confirmed": self.standing(), "fused": self.fused}

    def standing(self) -> str:
        """What reports say of this combination."""
        if self.combination is None:
            return "nothing to confirm without a card"
        where = [
            name
            for name, report in confirmed.counting()
            if confirmed.combination_of(report) == self.combination
        ]
        if self.simulated:
            return "a simulated card, which confirms nothing"
        if not where:
            return (
                f"no report confirms {self.combination}: run `flash-attn-npu validate --quick` "
                "and send us the file"
            )
        wrong = ", ".join(
            f"{row} ({kernel})" for row, kernel in confirmed.refuted(self.combination)
        )
        told = f"{self.combination} by {', '.join(where)}"
        return f"{told}; refuted, and not used: {wrong}" if wrong else told

    def __str__(self) -> str:
        return _tidy("\n".join(_lines(self)))


def doctor(simulate: bool = False) -> Page:
    """What is installed here, what clashes, and whether attention would be fused.

    Takes some seconds, as a child process imports torch and tries a small call.

    Example:
        >>> print(flash_attn_npu.doctor())  # doctest: +SKIP

    Args:
        simulate: look at a simulated Ascend instead.
    """
    probed = probe(simulate)
    card = probed.facts.get("card") or {}
    combination = None
    if card.get("count"):
        combination = Combination(card["soc"], card["cann"], card["torch_npu"])
    found = [clash for clash in clashes(probed) if not (simulate and "CANN" in clash.what)]
    return Page(
        _versions(probed),
        probed,
        found,
        clients(probed),
        settings.in_force(),
        combination,
        simulate,
    )


def _versions(probed: Probed) -> dict[str, str]:
    card = probed.facts.get("card") or {}
    cann = installed.cann()
    there = installed.cards()
    return {
        PROVIDER: installed.version(PROVIDER) or "not installed as a distribution",
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": installed.version("torch") or "absent",
        "torch_npu": installed.version("torch_npu") or "absent",
        "CANN": (card.get("cann") or (cann.version if cann else "") or "unknown")
        if cann or card
        else "absent",
        "driver": installed.driver() or "absent",
        "SoC": f"{card['soc']}, {card['count']} seen by torch_npu"
        if card.get("count")
        else f"unknown, {there} in /dev"
        if there
        else "no card",
    }


def _lines(page: Page) -> Iterator[str]:
    mark = " (SIMULATED CARD: nothing here is true of a real one)" if page.simulated else ""
    yield f"flash_attn_npu doctor, API of flash-attention {FLASH_ATTN_VERSION}{mark}"
    yield ""
    for name, number in page.versions.items():
        yield f"{name:<20} {number}"
    yield ""
    yield f"attention            {_verdict(page)}"
    served = page.probed.facts.get("attention") or {}
    if served.get("on_ascend"):
        yield f"on a card            {served['on_ascend']} ({served['assumed']}, by the table)"
    yield f"confirmed            {page.standing()}"
    yield ""
    yield "clashes" if page.clashes else "clashes              none"
    for clash in page.clashes:
        yield f"  [{'!!' if clash.fatal else '--'}] {clash.what}"
        yield f"       to mend it: {clash.mend}"
    yield from _kernels(page.probed.facts.get("operators"))
    yield ""
    yield "clients"
    for client in page.clients:
        told = f"{client.version}: {client.told}" if client.version else "not installed"
        yield f"  {client.name:<18} {told}"
    yield ""
    yield "settings"
    for setting in page.settings:
        source = "default" if setting.source == "default" else f"from {setting.source}"
        source = "environment" if setting.source == setting.name else source
        yield f"  {setting.name:<18} {setting.value} ({source})"


def _verdict(page: Page) -> str:
    served = page.probed.facts.get("attention")
    if page.fused and served:
        return f"fused: a small call was served by {served['kernel']}"
    if served:
        return f"NOT fused: {'; '.join(served['reasons']) or 'wrong numbers'}"
    if page.probed.failed:
        return f"NOT fused: it was not tried, as {page.probed.failed} failed"
    return "NOT fused: it was not tried, see the first clash"


def _kernels(needs: list[dict[str, Any]] | None) -> Iterator[str]:
    yield ""
    if needs is None:
        yield "kernels              unknown, as torch_npu is not imported"
        return
    yield "kernels"
    for need in needs:
        if need["missing"]:
            yield f"  [--] {need['for']}: {need['otherwise']}, as {', '.join(need['missing'])}"
        else:
            yield f"  [ok] {need['for']}: {', '.join(need['operators'])}"


def _tidy(text: str) -> str:
    # a page is pasted in public
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text

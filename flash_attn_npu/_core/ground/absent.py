"""An Ascend that is not there, so that the table can be asked about it on a laptop.

It stands where a problem has its device. The chip is named, and a torch_npu whose wheel was read:
`torch_npu.json` is operator -> schema -> versions of torch_npu that have it, and an operator that
a version is not listed under is absent from it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ArgumentError

__all__ = ["WORD", "Absent", "absent", "arguments", "default", "schema", "schemas", "versions"]

WORD = "ascend"
"""The policy that is about an Ascend that is not there: `ascend`, `ascend:SOC`,
`ascend:SOC:torch_npu`."""


@dataclass(frozen=True)
class Absent:
    """soc: such as Ascend910B3. torch_npu: one of `versions`. The rest is what a device has."""

    soc: str
    torch_npu: str
    type: str = "npu"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.soc}, torch_npu {self.torch_npu}"


@functools.cache
def schemas() -> Mapping[str, Mapping[str, list[str]]]:
    """What `torch_npu.json` holds; read when it is asked for, and by no import."""
    from importlib import resources

    text = (resources.files(__package__) / "torch_npu.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = json.loads(text)
    return found


@functools.cache
def versions() -> tuple[str, ...]:
    """Of the wheels that were read, the oldest first."""
    found = {v for them in schemas().values() for where in them.values() for v in where}
    return tuple(sorted(found, key=_numbers))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("."))


@functools.cache
def default() -> Absent:
    """What a policy is about that names neither."""
    return Absent("Ascend910B3", versions()[-1])


def schema(version: str, operator: str) -> str | None:
    """The operator's schema in a version of torch_npu, None if it is absent there."""
    found = (text for text, where in schemas()[operator].items() if version in where)
    return next(found, None)


@functools.cache
def arguments(version: str, operator: str) -> tuple[str, ...]:
    """The names of an operator's arguments in a version, none if it is absent there."""
    import torch

    text = schema(version, operator)
    if text is None:
        return ()
    return tuple(argument.name for argument in torch._C.parse_schema(text).arguments)


@functools.cache
def absent(policy: str) -> Absent | None:
    """The Ascend that a policy is about, None if it is another policy.

    Raises:
        ArgumentError: it names a chip or a torch_npu of which nothing is known.
    """
    word, *named = policy.split(":")
    if word != WORD:
        return None
    soc, torch_npu, *rest = (*named, *("", "")[len(named) :]) if len(named) < 2 else named
    soc, torch_npu = soc or default().soc, torch_npu or default().torch_npu
    if rest or not soc.startswith("Ascend") or torch_npu not in versions():
        raise ArgumentError(
            "policy",
            repr(policy),
            f"{WORD}, {WORD}:SOC or {WORD}:SOC:torch_npu, with a SOC such as Ascend910B3 or "
            f"Ascend950PR and a torch_npu of {', '.join(versions())}",
            f"write {WORD}:{default().soc}:{default().torch_npu}, for one",
        )
    return Absent(soc, torch_npu)

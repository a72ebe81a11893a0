"""An older torch_npu, pretended: its schemas are what is asked, and its operators bind by them.

The operators of the torch_npu that runs take what the older ones took, and more. So a call that an
older wheel would refuse is refused here before it reaches them, as torch refuses it: TypeError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from flash_attn_npu._core.ground import schemas, versions
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table.installed import NEEDS
from flash_attn_npu._surface import wheels

__all__ = ["Call", "Seen", "bind", "pretend_row", "pretended"]

KERNELS = str(Path("_core") / "kernels" / "ascend")


@dataclass(frozen=True)
class Call:
    """One call of an operator: where it stands in the package, and the arguments it passed."""

    operator: str
    file: str
    line: int
    arguments: frozenset[str]


@dataclass
class Seen:
    """The calls that reached operators of torch_npu, in order."""

    calls: list[Call] = field(default_factory=list)

    def operators(self) -> list[str]:
        return [call.operator for call in self.calls]


@cache
def parsed(text: str) -> Any:
    return torch._C.parse_schema(text)


def bind(text: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """The names of the arguments that a call passes, or the TypeError it would meet.

    Args:
        text: the operator's schema, None where it is absent.
    """
    if text is None:
        raise TypeError("no such operator")
    schema = parsed(text)
    by_position = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(by_position):
        raise TypeError(f"{schema.name}() takes {len(by_position)} by position, got {len(args)}")
    given = [*by_position[: len(args)], *kwargs]
    known = {argument.name for argument in schema.arguments}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{schema.name}(): Unknown keyword argument '{name}'")
    if len(set(given)) != len(given):
        raise TypeError(f"{schema.name}(): an argument is given twice: {given}")
    for argument in schema.arguments:
        if not argument.has_default_value() and argument.name not in given:
            raise TypeError(f"{schema.name}(): missing {argument.name}")
    return frozenset(given)


@contextmanager
def pretended(
    version: str, schema: Callable[[str, str], str | None] = wheels.schema
) -> Iterator[Seen]:
    """Inside the block, and for this package, the torch_npu of `version` is installed."""
    import torch_npu

    _require_as_much(version, schema)
    seen = Seen()
    with ExitStack() as stack:

        def replace(owner: object, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        replace(schemas, "_read", lambda operator: names(schema(version, operator)))
        replace(versions, "_loaded", lambda: version)
        for operator in wheels.schemas():
            for owner in (torch_npu, torch.ops.npu):
                if hasattr(owner, operator):
                    real, text = getattr(owner, operator), schema(version, operator)
                    replace(owner, operator, _checked(operator, text, real, seen))
        forget_all()
        stack.callback(forget_all)
        yield seen


def _require_as_much(version: str, schema: Callable[[str, str], str | None]) -> None:
    """Skip where the torch_npu that runs lacks what the pretended one is called with."""
    for operator, *arguments in (call for need in NEEDS for call in need.calls):
        there = set(names(schema(version, operator)))
        if there and there.issuperset(arguments) and not schemas.has(operator, *arguments):
            pytest.skip(f"torch_npu {versions.torch_npu_version()} is older: no such {operator}")


def names(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(a.name for a in parsed(text).arguments)


def _checked(
    operator: str, text: str | None, real: Callable[..., Any], seen: Seen
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(text, args, kwargs)
        frame = sys._getframe(1)
        seen.calls.append(Call(operator, frame.f_code.co_filename, frame.f_lineno, given))
        return real(*args, **kwargs)

    return call


def pretend_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the torch_npu be installed that a row of a table names, if it names one."""
    if name.startswith("a torch_npu older than"):
        monkeypatch.setattr(versions, "_loaded", lambda: "2.5.1")
    elif ", a torch_npu without " in name:
        gone = name.partition(" without ")[2].split(" and ")
        real = schemas._read
        monkeypatch.setattr(schemas, "_read", lambda o: () if o in gone else real(o))
    else:
        return
    forget_all()

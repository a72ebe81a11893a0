"""Parameters as the frozen surface writes them, against a function as Python sees it.

A frozen parameter is text: `x`, `x=0.0`, `*args`, `**kwargs`; a lone `*` makes those behind it
keyword-only. A default is source text, evaluated where our function lives.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Frozen", "differences", "parse"]

_POSITIONAL: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD: Any = inspect.Parameter.KEYWORD_ONLY


class Frozen(NamedTuple):
    """One parameter of upstream's; `default` is source text, None if there is none."""

    name: str
    kind: Any
    default: str | None


def parse(parameters: Sequence[str]) -> Iterator[Frozen]:
    """The parameters that a frozen signature lists."""
    kind = _POSITIONAL
    for text in parameters:
        name, has_default, default = text.partition("=")
        if name.startswith("**"):
            yield Frozen(name[2:], inspect.Parameter.VAR_KEYWORD, None)
        elif name.startswith("*"):
            kind = _KEYWORD
            if name != "*":
                yield Frozen(name[1:], inspect.Parameter.VAR_POSITIONAL, None)
        else:
            yield Frozen(name, kind, default if has_default else None)


def differences(
    parameters: Sequence[str],
    function: Any,
    names: Mapping[str, Any],
    except_for: Collection[str] = (),
) -> list[str]:
    """What distinguishes `function` from its frozen parameters, one line each.

    Args:
        parameters: upstream's, as the frozen surface writes them.
        function: ours.
        names: of our module, in which upstream's defaults are evaluated.
        except_for: names of parameters that are not compared, on either side.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        return [f"has no signature: {error}"]
    theirs = [one for one in parse(parameters) if one.name not in except_for]
    ours = [one for one in signature.parameters.values() if one.name not in except_for]
    order, our_order = [one.name for one in theirs], [one.name for one in ours]
    if order != our_order:
        return [f"takes ({', '.join(our_order)}), upstream ({', '.join(order)})"]
    return [
        line
        for frozen, parameter in zip(theirs, ours, strict=True)
        for line in _parameter(frozen, parameter, names)
    ]


def _parameter(
    frozen: Frozen, parameter: inspect.Parameter, names: Mapping[str, Any]
) -> Iterator[str]:
    if parameter.kind is not frozen.kind:
        yield f"{frozen.name} is {parameter.kind.description}, upstream {frozen.kind.description}"
    if (frozen.default is None) != (parameter.default is parameter.empty):
        ours = "none" if parameter.default is parameter.empty else repr(parameter.default)
        yield f"{frozen.name} has default {ours}, upstream {frozen.default or 'none'}"
    elif frozen.default is not None and not _same(frozen.default, parameter.default, names):
        yield f"{frozen.name} has default {parameter.default!r}, upstream {frozen.default}"


def _same(source: str, ours: Any, names: Mapping[str, Any]) -> bool:
    """Whether `source` means `ours`; 0, 0.0 and False are three values."""
    known = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    try:
        theirs = eval(source, {**names, **known})
    except NameError:
        return source == repr(ours)
    return theirs is ours or repr(theirs) == repr(ours)

"""The exceptions this package raises, and the one way their messages are built.

Every message answers four questions: which argument, what came, what is allowed, what to do. An
error is made of the four answers, and carries them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "ActivationError",
    "ArgumentError",
    "ArgumentTypeError",
    "UnsupportedError",
    "printable",
    "renamed",
]


class _ExplainedError(Exception):
    """An error that answers the four questions, as attributes and in one line.

    argument: which argument, as the caller knows it. came: what it got. allowed, remedy: what it
        may get, and what to do.
    """

    def __init__(self, argument: str, came: object, allowed: object, remedy: object) -> None:
        self.argument = argument
        self.came, self.allowed, self.remedy = map(printable, (came, allowed, remedy))
        super().__init__(
            f"{argument}: got {self.came}; allowed: {self.allowed}; to fix it: {self.remedy}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.came, self.allowed, self.remedy)


class ArgumentError(_ExplainedError, ValueError, RuntimeError):
    """An argument has a value, a shape, a dtype or a device that flash-attn does not accept.

    A RuntimeError as well, which flash-attn's own checks raise.
    """


class ArgumentTypeError(_ExplainedError, TypeError):
    """An argument is an object of the wrong Python type."""


class UnsupportedError(_ExplainedError, NotImplementedError):
    """The call is legal for flash-attn, but nothing here may serve it exactly."""


class ActivationError(_ExplainedError, RuntimeError):
    """`install()` or `uninstall()` would leave `import flash_attn` in a state nobody asked for."""


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error about an argument that the caller knows by another name.

    Args:
        names: what arguments are called in the error, and by the caller. Several may be parts of
            one: of q, k and v, all qkv, "q, k and v" becomes "qkv".
    """
    if not isinstance(error, _ExplainedError) or error.argument not in names:
        return error
    words = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def own(text: str) -> str:
        text = words.sub(lambda found: names[found[0]], text)
        for name in set(names.values()):
            text = re.sub(rf"\b{name}(?:, {name})* and {name}\b", name, text)
        return text

    new, allowed, remedy = names[error.argument], own(error.allowed), own(error.remedy)
    return type(error)(new, error.came, allowed, remedy)


def printable(text: object) -> str:
    """`text` with line ends and other control characters as escapes: nobody may forge a line."""
    told = str(text)
    if told.isprintable():
        return told
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in told)

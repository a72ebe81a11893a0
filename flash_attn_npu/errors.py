"""The exceptions this package raises, and the one way their messages are built.

Every message answers four questions: which argument, what came, what is allowed, what to do.
An error carries the four answers as attributes, too.
"""

from __future__ import annotations

__all__ = [
    "ActivationError",
    "ArgumentError",
    "ArgumentTypeError",
    "UnsupportedError",
    "explain",
    "printable",
    "renamed",
]


class Explanation(str):
    """A message, and the four answers it was made of."""

    argument: str
    came: str
    allowed: str
    remedy: str


class _ExplainedError(Exception):
    """An error with the four answers as attributes, None where the message was not explained."""

    argument: str | None = None
    came: str | None = None
    allowed: str | None = None
    remedy: str | None = None

    def __init__(self, message: str = "") -> None:
        # plain text and attributes: what pickle and copy restore
        super().__init__(str(message))
        if isinstance(message, Explanation):
            self.__dict__.update(vars(message))


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


def explain(argument: str, came: object, allowed: str, remedy: str) -> Explanation:
    """`q: got ...; allowed: ...; to fix it: ...`, the shape of every message, in one line."""
    came, allowed, remedy = printable(came), printable(allowed), printable(remedy)
    message = Explanation(f"{argument}: got {came}; allowed: {allowed}; to fix it: {remedy}")
    message.argument, message.came = argument, came
    message.allowed, message.remedy = allowed, remedy
    return message


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The error about an argument that the caller knows by another of `names`."""
    old = getattr(error, "argument", None)
    if not isinstance(error, _ExplainedError) or old not in names:
        return error
    new = names[old]
    remedy = error.remedy or ""
    if len(old) == 1:
        remedy = remedy.replace(f"{old} = {old}.", f"{new} = {new}.")
    else:
        remedy = remedy.replace(old, new)
    return type(error)(explain(new, error.came, error.allowed or "", remedy))


def printable(text: object) -> str:
    """`text` with line ends and other control characters as escapes: nobody may forge a line."""
    told = str(text)
    if told.isprintable():
        return told
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in told)

"""The exceptions this package raises, and the one way their messages are built.

Every message answers four questions: which argument, what came, what is allowed, what to do.
"""

from __future__ import annotations

__all__ = [
    "ActivationError",
    "ArgumentError",
    "ArgumentTypeError",
    "UnsupportedError",
    "explain",
]


class ArgumentError(ValueError):
    """An argument has a value, a shape, a dtype or a device that flash-attn does not accept."""


class ArgumentTypeError(TypeError):
    """An argument is an object of the wrong Python type."""


class UnsupportedError(NotImplementedError):
    """The call is legal for flash-attn, but nothing here may serve it exactly."""


class ActivationError(RuntimeError):
    """`install()` or `uninstall()` would leave `import flash_attn` in a state nobody asked for."""


def explain(argument: str, came: object, allowed: str, remedy: str) -> str:
    """`q: got ...; allowed: ...; to fix it: ...`, the shape of every message."""
    return f"{argument}: got {came}; allowed: {allowed}; to fix it: {remedy}"

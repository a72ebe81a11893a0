"""flash-attention's Python API on Ascend NPUs, and exactly the same on any other device.

The names of `flash_attn` 2.8 live here, module for module; `install()` makes `import flash_attn`
mean this package. `attention_forward_varlen` is Huawei's own function, with its own contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._commands.starting import command_line_starts
from ._version import FLASH_ATTN_VERSION
from .errors import ActivationError, ArgumentError, ArgumentTypeError, UnsupportedError

if TYPE_CHECKING:
    from ._diagnosis.page import doctor

# the command line says what it can without torch, and asks for the rest when it runs a program
if not command_line_starts():
    from . import _activation, bert_padding, flash_attn_interface
    from ._activation import install, installed, uninstall
    from ._core.attention.mindie import attention_forward_varlen
    from ._core.ground.memory import forget_lengths
    from ._core.ground.settings import fallback
    from ._core.ground.usage import report, reporting
    from ._integrations.torch_attention import register_torch
    from .flash_attn_interface import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )

__version__ = FLASH_ATTN_VERSION

__all__ = [
    "ActivationError",
    "ArgumentError",
    "ArgumentTypeError",
    "UnsupportedError",
    "__version__",
    "attention_forward_varlen",
    "bert_padding",
    "doctor",
    "fallback",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "forget_lengths",
    "install",
    "installed",
    "register_torch",
    "report",
    "reporting",
    "uninstall",
]

if not command_line_starts():
    # of a child that was told to, or in an environment that was activated
    _activation.follow()


def __dir__() -> list[str]:
    return sorted(__all__)


# a type checker would take it for a licence to ask for anything
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # the command line has imported this package without its parts, if it has not asked for all
        if name.startswith("__") or "_activation" not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "doctor":
            # it reads what is installed, which most programs never ask
            from ._diagnosis.page import doctor

            return doctor
        return _activation.attribute(name)

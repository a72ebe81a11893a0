"""FlashAttention 3's import names and distribution, served while somebody asks for them.

Clients prefer FlashAttention 3 the moment it can be imported, so nobody finds it by accident.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .._startup import ALIASES_3, FLASH_ATTN_3_VERSION, PACKAGE, PROVIDER
from ..errors import ActivationError
from . import occupant
from .distribution import VirtualDistribution
from .finder import AliasFinder
from .metadata import VirtualDistributionFinder

__all__ = ["refuse_loaded", "serve", "served"]

NAMES = (
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
)
_INTERFACE = "flash_attn_interface"
_finders = (
    AliasFinder("flash_attn_3", f"{PACKAGE}._flash_attn_3", ("", _INTERFACE)),
    AliasFinder(_INTERFACE, f"{PACKAGE}._flash_attn_3.{_INTERFACE}", ("",), NAMES),
)
_distribution = VirtualDistributionFinder(
    VirtualDistribution(
        "flash_attn_3",
        FLASH_ATTN_3_VERSION,
        "\n".join(ALIASES_3),
        PROVIDER,
        Path(__file__).parents[2],
    )
)


def served() -> bool:
    """Whether the names are ours."""
    return any(finder in sys.meta_path for finder in _finders)


def serve(wanted: bool) -> None:
    """Answer to the names, or no more; each step looks at what is there."""
    for finder in (_distribution, *_finders):
        if wanted:
            finder.insert()
        else:
            finder.remove()


def refuse_loaded() -> None:
    """Refuse to take names that somebody else's FlashAttention 3 has.

    Raises:
        ActivationError: it is imported, or the import of a name is blocked.
    """
    for name, finder in zip(ALIASES_3, _finders, strict=True):
        for loaded, module in occupant.loaded_as(name).items():
            if not finder.owns(loaded, module):
                where = "None, which blocks it" if module is None else occupant.whereabouts(module)
                raise ActivationError(
                    f"sys.modules[{loaded!r}]",
                    where,
                    "no entry",
                    "call flash_attn_npu.install(fa3=True) before anything imports it",
                )

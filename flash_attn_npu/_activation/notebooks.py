"""`%load_ext flash_attn_npu` and `%unload_ext flash_attn_npu` in IPython and its notebooks."""

from __future__ import annotations

from .install import Activation, claim

__all__ = ["load_ipython_extension", "unload_ipython_extension"]

_claims: list[Activation] = []


def load_ipython_extension(ipython: object) -> None:
    """Install, for the workers that cells start as well."""
    _claims.append(claim(children=True))


def unload_ipython_extension(ipython: object) -> None:
    """Give up what `%load_ext` claimed; other claims stay."""
    while _claims:
        _claims.pop().uninstall()

"""The checks that tables name. They are read when a first call is compared: on a CPU never."""

from __future__ import annotations

from collections.abc import Callable

from .kinds import Check

__all__ = ["ATTENTION", "CACHE", "ROWWISE"]


def _attention() -> Check:
    from .attention import CHECK

    return CHECK


def _rowwise() -> Check:
    from .rowwise import CHECK

    return CHECK


def _cache() -> Check:
    from .cache import CHECK

    return CHECK


def _later(check: Callable[[], Check]) -> Check:
    return Check(
        lambda case: check().kinds(case),
        lambda case, kernel: check().over(case, kernel),
    )


ATTENTION = _later(_attention)
CACHE = _later(_cache)
ROWWISE = _later(_rowwise)

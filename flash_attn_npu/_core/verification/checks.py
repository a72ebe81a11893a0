"""The checks that tables name. They are read when a first call is compared: on a CPU never."""

from __future__ import annotations

from collections.abc import Callable

from .kinds import Check

__all__ = ["ATTENTION", "ROWWISE"]


def _attention() -> Check:
    from .attention import CHECK

    return CHECK


def _rowwise() -> Check:
    from .rowwise import CHECK

    return CHECK


def _later(check: Callable[[], Check]) -> Check:
    return Check(
        lambda case: check().kinds(case),
        lambda case, kernel: check().over(case, kernel),
    )


ATTENTION = _later(_attention)
ROWWISE = _later(_rowwise)

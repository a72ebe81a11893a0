"""A distribution that exists only inside this process, for `importlib.metadata`.

It lets code that asks for a version or for the provider of an import name get an answer while
its finder is in `sys.meta_path`, without a file on disk. This module knows no product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType

from .distribution import VirtualDistribution
from .finder import insert_first, take_out

__all__ = ["VirtualDistribution", "VirtualDistributionFinder"]


class VirtualDistributionFinder(DistributionFinder, MetaPathFinder):
    """Makes one virtual distribution visible while inserted."""

    def __init__(self, distribution: VirtualDistribution) -> None:
        self._distribution = distribution

    def insert(self) -> None:
        """Make the distribution visible."""
        insert_first(self)

    def remove(self) -> None:
        """Make it invisible again."""
        take_out(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """None: this finder knows distributions, not modules."""
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        """The distribution, unless another name or particular directories are asked for."""
        asked = vars(context) if context is not None else {}
        if "path" not in asked and self._distribution.answers(asked.get("name")):
            yield self._distribution

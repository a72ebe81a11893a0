"""A distribution that exists only inside this process, for `importlib.metadata`.

It lets code that asks for a version or for the provider of an import name get an answer while
its finder is in `sys.meta_path`, without a file on disk. This module knows no product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from .finder import insert_first, take_out

__all__ = ["VirtualDistribution", "VirtualDistributionFinder"]


class VirtualDistribution(Distribution):
    """Metadata held in memory: `METADATA`, `top_level.txt` and `INSTALLER`.

    Args:
        name: distribution name as pip would spell it.
        version: version to report.
        import_name: top-level name that the distribution provides.
        provider: distribution that really provides it; named in Summary and INSTALLER.
        location: directory of the providing package.
    """

    def __init__(
        self, name: str, version: str, import_name: str, provider: str, location: Path
    ) -> None:
        self._name = name
        self._location = location
        self._files = {
            "METADATA": (
                "Metadata-Version: 2.1\n"
                f"Name: {name}\n"
                f"Version: {version}\n"
                f"Summary: provided in this process by {provider}; nothing is installed on disk\n"
            ),
            "top_level.txt": f"{import_name}\n",
            "INSTALLER": f"{provider}\n",
        }

    def answers(self, name: str | None) -> bool:
        """Whether a query for `name` (None: for everything) includes this distribution."""
        return name is None or _normalised(name) == _normalised(self._name)

    def read_text(self, filename: str) -> str | None:
        """Content of one metadata file, None when there is none of that name."""
        return self._files.get(filename)

    def locate_file(self, path: object) -> Path:
        """Where a file of the distribution would lie."""
        return self._location / str(path)


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


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

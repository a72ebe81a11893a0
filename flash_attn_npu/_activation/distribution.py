"""The metadata of a distribution, held in memory.

Start-up code runs this file by its path: it imports nothing of the package, and knows no product.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution
from pathlib import Path

__all__ = ["VirtualDistribution"]


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
        self, name: str, version: str, import_name: str, provider: str, location: str | Path
    ) -> None:
        self._name = name
        self._location = Path(location)
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


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""What programs look for on a package that is loaded into them, and that nobody lists."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["attribute"]


def attribute(name: str) -> Any:
    """What IPython and pytest ask the package for.

    Raises:
        AttributeError: for any other name.
    """
    if name in ("load_ipython_extension", "unload_ipython_extension"):
        return getattr(importlib.import_module(f"{__package__}.notebooks"), name)
    if name == "pytest_plugins":
        # pytest registers the hooks of these; of a package itself it would read dir()
        return [f"{__package__}.pytest_plugin"]
    package = __package__.partition(".")[0]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")

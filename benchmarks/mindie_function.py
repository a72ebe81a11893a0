"""Huawei's own attention_forward_varlen, out of the installed mindiesd, for comparison.

Importing mindiesd itself loads vendor libraries and opens log files, so its packages are left
empty here and only the one module runs, with the real exceptions and a plain logger.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_MODULE = "mindiesd.layers.flash_attn.attention_forward_varlen"
_EXCEPTIONS = "mindiesd.utils.exception"


def load() -> tuple[ModuleType, type[Exception]]:
    """The module with `attention_forward_varlen`, and the exception it refuses with."""
    spec = importlib.util.find_spec("mindiesd")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("mindiesd is not installed", name="mindiesd")
    with _empty_packages(Path(spec.submodule_search_locations[0])):
        module = importlib.import_module(_MODULE)
        return module, sys.modules[_EXCEPTIONS].ParametersInvalid


@contextmanager
def _empty_packages(folder: Path) -> Iterator[None]:
    logs = ModuleType("mindiesd.utils.logs.logging")
    logs.logger = logging.getLogger("mindiesd")
    packages = {"": folder, ".utils": folder / "utils", ".utils.logs": folder / "utils" / "logs"}
    packages |= {".layers": folder / "layers", ".layers.flash_attn": folder / "layers/flash_attn"}
    for suffix, path in packages.items():
        package = ModuleType(f"mindiesd{suffix}")
        package.__path__ = [str(path)]
        sys.modules[package.__name__] = package
    sys.modules[logs.__name__] = logs
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mindiesd"]:
            del sys.modules[name]

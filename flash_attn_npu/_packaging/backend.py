"""The build backend: setuptools, and what Python reads and runs at its start.

setuptools has no way to place files at the root of site-packages, where `.pth` and `.start` files
must lie, with the module that they name. So the wheel that it built, editable or not, gets them
here, and a RECORD that lists them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HERE = Path(__file__).parent
START_FILES = (HERE / "_flash_attn_npu_startup.py", *sorted(HERE.glob("_zz_*")))


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """A wheel with the start files at its root."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return _with_start_files(wheel_directory, name)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """An editable wheel with the start files at its root."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return _with_start_files(wheel_directory, name)


def _with_start_files(folder: str, name: str) -> str:
    old, new = Path(folder, name), Path(folder, f"{name}.new")
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                for file in START_FILES:
                    there = zipfile.ZipInfo(file.name, entry.date_time)
                    there.external_attr = entry.external_attr
                    target.writestr(there, file.read_bytes(), zipfile.ZIP_DEFLATED)
                    data += _record(file).encode()
            target.writestr(entry, data, entry.compress_type)
    os.replace(new, old)
    return name


def _record(file: Path) -> str:
    content = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{file.name},sha256={digest},{len(content)}\n"

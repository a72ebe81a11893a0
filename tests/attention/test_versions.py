"""Which torch_npu is too old."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

from flash_attn_npu._core.ground import versions
from flash_attn_npu._core.ground.memory import forget_all


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget_all()
    yield
    forget_all()


def installed(monkeypatch: Any, torch_npu: str | None) -> None:
    monkeypatch.setattr(versions, "_loaded", lambda: torch_npu)
    monkeypatch.setattr(versions, "_on_disk", lambda: None)


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("2.5.1", True),
        ("2.5.1.post1", True),
        ("2.6.0rc1", True),
        ("2.6.0", False),
        ("2.6.0.post5", False),
        ("2.10.0", False),
        ("2.8.0.dev20250801+gitabcdef", False),
        ("a build of their own", False),
        (None, False),
    ],
)
def test_the_oldest_that_is_supported(
    npu: torch.device, monkeypatch: Any, version: str | None, too_old: bool
) -> None:
    installed(monkeypatch, version)
    assert versions.too_old(npu) == too_old
    assert not versions.too_old(torch.device("cpu"))


def test_one_that_is_not_imported_is_looked_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "_loaded", lambda: None)
    monkeypatch.setattr(metadata, "version", lambda name: {"torch_npu": "2.9.0.post1"}[name])
    assert versions.torch_npu_version() == "2.9.0.post1"
    forget_all()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert versions.torch_npu_version() is None

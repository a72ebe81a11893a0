"""Which torch_npu belongs to which torch, and which is too old."""

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


def installed(monkeypatch: Any, torch_version: str, torch_npu: str | None) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(versions, "_loaded", lambda: torch_npu)
    monkeypatch.setattr(versions, "_on_disk", lambda: None)


@pytest.mark.parametrize(
    ("torch_version", "torch_npu"),
    [
        ("2.6.0", "2.6.0"),
        ("2.6.0+cpu", "2.6.0.post5"),
        ("2.7.1", "2.7.1.post2"),
        ("2.13.0a0+git1234", "2.13.0rc1"),
        ("2.8.0", "2.8.0.dev20250801+gitabcdef"),
        ("2.6.0", None),
        ("2.6.0", "a build of their own"),
    ],
)
def test_these_belong_together(monkeypatch: Any, torch_version: str, torch_npu: str) -> None:
    installed(monkeypatch, torch_version, torch_npu)
    assert versions.mismatch() is None


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "said"),
    [
        (
            "2.7.1",
            "2.6.0.post5",
            "torch_npu 2.6.0.post5 belongs to torch 2.6.0, and torch is 2.7.1",
        ),
        ("2.7.0", "2.7.1", "torch_npu 2.7.1 belongs to torch 2.7.1, and torch is 2.7.0"),
        ("2.13.0+cpu", "2.12.0", "torch_npu 2.12.0 belongs to torch 2.12.0"),
        ("2.5.1", "2.5.1.post1", "torch_npu 2.5.1.post1 is older than 2.6.0"),
    ],
)
def test_these_do_not(monkeypatch: Any, torch_version: str, torch_npu: str, said: str) -> None:
    installed(monkeypatch, torch_version, torch_npu)
    text = versions.mismatch()
    assert text is not None
    assert text.startswith(said)


def test_too_old_is_asked_of_npus_only(npu: torch.device, monkeypatch: Any) -> None:
    installed(monkeypatch, "2.5.1", "2.5.1")
    assert versions.too_old(npu)
    assert not versions.too_old(torch.device("cpu"))
    forget_all()
    installed(monkeypatch, "2.6.0", "2.6.0")
    assert not versions.too_old(npu)


def test_one_that_is_not_imported_is_looked_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "_loaded", lambda: None)
    monkeypatch.setattr(metadata, "version", lambda name: {"torch_npu": "2.9.0.post1"}[name])
    assert versions.torch_npu_version() == "2.9.0.post1"
    forget_all()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert versions.torch_npu_version() is None

"""The in-memory distribution, as `importlib.metadata` sees it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from flash_attn_npu._activation.metadata import VirtualDistribution, VirtualDistributionFinder

pytestmark = pytest.mark.usefixtures("import_system")


@pytest.fixture
def finder(tmp_path: Path) -> Iterator[VirtualDistributionFinder]:
    distribution = VirtualDistribution("virtual-thing", "1.2.3", "thing", "the-provider", tmp_path)
    finder = VirtualDistributionFinder(distribution)
    finder.insert()
    yield finder
    finder.remove()


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("name", ["virtual-thing", "virtual_thing", "Virtual.Thing"])
def test_found_under_every_spelling(name: str) -> None:
    assert metadata.version(name) == "1.2.3"


@pytest.mark.usefixtures("finder")
def test_says_who_provides_it() -> None:
    found = metadata.distribution("virtual-thing")
    assert found.metadata["Name"] == "virtual-thing"
    assert "the-provider" in found.metadata["Summary"]
    assert found.read_text("INSTALLER") == "the-provider\n"
    assert found.read_text("no such file") is None
    assert not found.requires
    assert not found.files
    assert metadata.packages_distributions()["thing"] == ["virtual-thing"]


@pytest.mark.usefixtures("finder")
def test_does_not_answer_for_other_names_or_folders(tmp_path: Path) -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("virtual-thing-2")
    assert list(metadata.distributions(path=[str(tmp_path)])) == []


def test_gone_after_removal(finder: VirtualDistributionFinder) -> None:
    finder.remove()
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("virtual-thing")
    assert "thing" not in metadata.packages_distributions()

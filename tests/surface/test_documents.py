"""Every block of Python in the README and on the site runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.old_torch import TORCH

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

RUNNER = """
import json, sys, traceback
sys.modules["torch_npu"] = None  # without CANN its import ends with an error
outcome = {}
for page, blocks in json.load(sys.stdin).items():
    import flash_attn_npu
    names = {"__name__": "__main__"}  # a page is read from top to bottom
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    except BaseException:
        outcome[page] = traceback.format_exc()
    else:
        outcome[page] = ""
    flash_attn_npu.uninstall()
print("OUTCOME" + json.dumps(outcome))
"""


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each page's blocks: "" or a traceback. One child runs them all."""
    pages = {page.name: found for page in PAGES if (found := blocks(page, "python"))}
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", RUNNER],
        input=json.dumps(pages),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert "OUTCOME" in done.stdout, done.stderr
    found: dict[str, str] = json.loads(done.stdout.rpartition("OUTCOME")[2])
    return found


@pytest.mark.parametrize("page", [page.name for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(outcomes: dict[str, str], page: str) -> None:
    if "No module named 'torch.nn.attention.varlen'" in outcomes[page]:
        assert TORCH < (2, 10)
        pytest.skip("an older torch has no varlen_attn")
    assert outcomes[page] == ""

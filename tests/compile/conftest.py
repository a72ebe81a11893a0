"""Tracing state is global: every test here starts without compiled code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """Runs Python with arguments in an empty folder; returns what it printed, once it succeeded."""
    spec = importlib.util.find_spec("flash_attn_npu")
    assert spec is not None
    assert spec.origin is not None
    root = str(Path(spec.origin).parents[1])

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run

"""`flash_attn` as clients find it; transformers' tests install it as they need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch.distributed as dist

import flash_attn_npu


@pytest.fixture
def flash_attn() -> Iterator[ModuleType]:
    """The module that clients get."""
    with flash_attn_npu.install():
        yield importlib.import_module("flash_attn")
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


@pytest.fixture
def process_group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()

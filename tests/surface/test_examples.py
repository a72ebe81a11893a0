"""The examples in the docstrings of public functions run, and show what they say."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch

from flash_attn_npu import bert_padding, flash_attn_interface

FUNCTIONS = [
    *((flash_attn_interface, x) for x in flash_attn_interface.__all__ if x.startswith("flash_attn_")
      and x != "flash_attn_gpu"),
    (bert_padding, "index_first_axis"),
    (bert_padding, "pad_input"),
    (bert_padding, "unpad_input"),
    (bert_padding, "unpad_input_for_concatenated_sequences"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=lambda x: str(x).rpartition(".")[2])
def test_the_example_of_a_function(module: ModuleType, name: str) -> None:
    names = {**vars(module), "torch": torch}
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(module, name), name, module=False, globs=names)
    assert found.examples, "it shows no call"
    told: list[str] = []
    ran = doctest.DocTestRunner().run(found, out=told.append)
    assert ran.attempted
    assert not ran.failed, "".join(told)

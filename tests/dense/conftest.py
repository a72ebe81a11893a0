"""Every test starts from the same random numbers: errors are measured on a few of them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)

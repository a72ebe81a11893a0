"""What every test module may use: the simulated Ascend, and a fresh start for every test.

Helpers are imported by their full name (`from tests.helpers import reference`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# torch must not load torch_npu by itself: there is no CANN, here before the stubs and in children
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# Most tests count what a call launches and copies; those of the comparison itself turn it on
os.environ.setdefault("FLASH_ATTN_NPU_VERIFY", "off")

import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.rowwise import small
from tests.helpers.accusations import Accusations, searching, with_a_card

REASON = virtual_ascend.start()
ACCUSATIONS = Accusations()
# The tensors are small, and waiting workers cost more than they bring
torch.set_num_threads(1)
if REASON is None:
    virtual_ascend.enable()
else:
    # installed without its libraries it would fail the import of transformers, which looks for it
    sys.modules["torch_npu"] = None  # type: ignore[assignment]

# The same examples on every run, at any speed
settings.register_profile("properties", deadline=None, derandomize=True, database=None)
settings.load_profile("properties")


def pytest_configure(config: pytest.Config) -> None:
    if REASON is not None and os.environ.get("FLASH_ATTN_NPU_REQUIRE_ASCEND") == "1":
        raise pytest.UsageError(f"the virtual Ascend is required but not running: {REASON}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if searching():
        found = with_a_card(items)
        others = set(items) - set(found)
        config.hook.pytest_deselected(items=list(others))
        items[:] = found
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:
        raise pytest.UsageError(f"a test's name holds an address: {moving[0]}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REASON is not None:
        terminalreporter.write_line(f"virtual Ascend: not running: {REASON}")
        return
    import torch_npu

    soc = torch.npu.get_device_name()
    terminalreporter.write_line(
        f"virtual Ascend: running (torch_npu {torch_npu.__version__}, SoC {soc}; simulated)"
    )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Every test draws the same numbers whenever it runs, and nothing is remembered or said yet."""
    forget_all()
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _believed() -> Iterator[None]:
    """A card that tells no lie is never accused: see `tests.helpers.accusations`."""
    ACCUSATIONS.taken()
    yield
    accused = ACCUSATIONS.taken()
    if accused:
        pytest.fail(f"an honest card was accused: {accused}", pytrace=False)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of its own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, too, no call is so small that its gradient is left to torch's own autograd."""
    monkeypatch.setattr(small, "SMALL", 0)


def _device(name: str) -> torch.device:
    if name == "npu" and REASON is not None:
        pytest.skip(f"the virtual Ascend is not running: {REASON}")
    return torch.device("npu:0" if name == "npu" else name)


@pytest.fixture
def npu() -> torch.device:
    return _device("npu")


@pytest.fixture(params=["cpu", "npu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return _device(request.param)

"""What every test module may use: the simulated Ascend, started before anything imports torch.

Test modules import their helpers (virtual_ascend among them) by name: pytest puts this folder on
sys.path.
"""

from __future__ import annotations

import os
import sys

import pytest
import virtual_ascend

REASON = virtual_ascend.start()

import torch  # noqa: E402

# A child process has no stubs: it would fail to import torch if that loaded torch_npu
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# The tensors are small, and waiting workers cost more than they bring
torch.set_num_threads(1)
if REASON is None:
    virtual_ascend.enable()
else:
    # installed without its libraries it would fail the import of transformers, which looks for it
    sys.modules["torch_npu"] = None  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    if REASON is not None and os.environ.get("FLASH_ATTN_NPU_REQUIRE_ASCEND") == "1":
        raise pytest.UsageError(f"the virtual Ascend is required but not running: {REASON}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REASON is not None:
        terminalreporter.write_line(f"virtual Ascend: not running: {REASON}")
        return
    import torch_npu

    soc = torch.npu.get_device_name()
    terminalreporter.write_line(
        f"virtual Ascend: running (torch_npu {torch_npu.__version__}, SoC {soc}; simulated)"
    )


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

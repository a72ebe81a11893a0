"""`pytest -p flash_attn_npu`: the tests, their conftest files and workers find flash_attn."""

from __future__ import annotations

import pytest

from ..errors import ActivationError
from .install import Activation, claim

_CLAIM = pytest.StashKey[Activation]()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install before the first conftest file is imported."""
    _claim(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Install, where a conftest file named the plugin."""
    _claim(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind for who runs pytest in a process of theirs."""
    if _CLAIM in config.stash:
        config.stash[_CLAIM].uninstall()
        del config.stash[_CLAIM]


def _claim(config: pytest.Config) -> None:
    # told by -p no:..., after -p had made pytest register this module
    unwanted = config.pluginmanager.is_blocked(__package__.partition(".")[0])
    if unwanted or _CLAIM in config.stash:
        return
    try:
        config.stash[_CLAIM] = claim(children=True)
    except ActivationError as error:
        raise pytest.UsageError(str(error)) from error

"""State that threads share: walks that nothing can disturb, and locks that a fork does not keep."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from types import ModuleType

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._activation import finder
from flash_attn_npu._core.ground import usage
from flash_attn_npu._core.ground.locks import Lock
from flash_attn_npu._core.ground.memory import Memo, PerTensorMemo, snapshot
from flash_attn_npu._core.kernels.ascend import determinism
from tests.helpers.forked import exit_code_of

NUMBERS = count()


@contextmanager
def growing(grow: Callable[[int], object]) -> Iterator[None]:
    """Whatever makes an object inside may call `grow`, as another thread might at that moment."""

    class Seed:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            grow(next(NUMBERS))
            if alive:
                Seed()

    alive, thresholds = [True], gc.get_threshold()
    gc.collect()
    Seed()
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        alive.clear()
        gc.collect()


@pytest.fixture
def many_tallies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_tallies", {})
    for number in range(50):
        usage.tally(f"function {number}", "kernel", ()).calls = 1


@pytest.mark.usefixtures("many_tallies")
def test_tallies_that_appear_during_a_report() -> None:
    with growing(lambda number: usage.tally(f"new {number}", "kernel", ())):
        assert len(usage.report().tallies) == 50
        with usage.reporting() as region:
            usage.tally("function 3", "kernel", ()).calls += 2
            assert [(x.function, x.calls) for x in region.tallies] == [("function 3", 2)]
    assert [(x.function, x.calls) for x in region.tallies] == [("function 3", 2)]
    assert any(function.startswith("new") for function, *_ in usage._tallies)


def test_entries_that_appear_during_a_walk() -> None:
    shared = {number: number for number in range(-50, 0)}
    with growing(lambda number: shared.setdefault(number, number)):
        found = snapshot(shared)
    assert found[:50] == [(number, number) for number in range(-50, 0)]
    assert len(shared) > 50


def test_a_memo_that_is_filled_and_emptied_while_it_makes_room() -> None:
    memo: Memo[int, torch.Tensor] = Memo("for a test", 20, nbytes=1000)
    tensor = torch.zeros(20, dtype=torch.uint8)
    with growing(lambda number: memo.put(-number, tensor)):
        for number in range(200):
            memo.put(number, tensor)
            if number % 50 == 0:
                memo.clear()
    assert 0 < len(memo) <= 21


def test_threads_fill_one_memo(npu: torch.device) -> None:
    memo: PerTensorMemo[int] = PerTensorMemo("for a test", 3)
    wrong = []

    def fill(number: int) -> None:
        torch.npu.set_device(npu)
        try:
            for i in range(200):
                tensor = torch.tensor([number, i], device=npu)
                if memo.get(tensor, lambda x: int(x.sum())) != number + i:
                    wrong.append((number, i))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def locks() -> dict[str, Lock]:
    found = {}
    for name, module in snapshot(sys.modules):
        if name.split(".")[0] == "flash_attn_npu" and isinstance(module, ModuleType):
            found |= {f"{name}.{k}": v for k, v in vars(module).items() if isinstance(v, Lock)}
    return found


def test_no_module_holds_a_lock_that_a_fork_would_keep() -> None:
    plain = (type(threading.Lock()), type(threading.RLock()), threading.Condition)
    assert len(locks()) >= 3
    for name, module in snapshot(sys.modules):
        if name.split(".")[0] == "flash_attn_npu" and isinstance(module, ModuleType):
            assert not [k for k, v in vars(module).items() if isinstance(v, plain)], name


def installs() -> bool:
    with flash_attn_npu.install():
        return flash_attn_npu.installed()


def deterministic() -> bool:
    with determinism.deterministically():
        return torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    ("lock", "use"),
    [
        (sys.modules["flash_attn_npu._activation.install"]._lock, installs),
        (finder._LOCK, installs),
        (determinism._lock, deterministic),
    ],
    ids=["install", "finder", "deterministic"],
)
def test_a_child_takes_what_another_thread_holds(
    lock: AbstractContextManager[None], use: Callable[[], bool]
) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        assert exit_code_of(use, seconds=20) == 0
    finally:
        release.set()
        thread.join()
    assert use()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_keeps_what_the_thread_that_forked_holds() -> None:
    def releases_it() -> bool:
        lock.__exit__()
        return use_in_thread(lock)

    lock = Lock()
    with lock:
        assert exit_code_of(releases_it, seconds=20) == 0
    assert use_in_thread(lock)


def use_in_thread(lock: Lock) -> bool:
    used = []

    def use() -> None:
        with lock:
            used.append(True)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)
    return bool(used)

"""Host copies of cumulative lengths: one per tensor, and never of what a tensor held before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn_npu._core.ground.lengths import MEMO_SIZE, host_ends, host_lengths, remember_lengths
from flash_attn_npu._core.ground.memory import PerTensorMemo, forget_lengths, memos
from flash_attn_npu.errors import ArgumentError
from tests.helpers.forked import exit_code_of

Change = Callable[[Tensor], Any]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_lengths()
    yield
    forget_lengths()


def lengths(*values: int, device: torch.device | str = "npu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def read(cu_seqlens: Any) -> tuple[int, ...]:
    return host_lengths("cu_seqlens_q", cu_seqlens).cumulative


def qkv(device: torch.device | str = "npu") -> Tensor:
    torch.manual_seed(0)
    return torch.randn(9, 3, 2, 8).to(device)


def copies(call: Callable[[], Any]) -> int:
    with virtual_ascend.record() as rec:
        call()
    assert not rec.host_to_device
    return len(rec.device_to_host)


def test_what_is_read(device: torch.device) -> None:
    found = host_lengths("cu_seqlens_q", lengths(0, 4, 4, 9, device=device))
    assert found.cumulative == (0, 4, 4, 9)
    assert found.ends == [4, 4, 9]
    assert found.seqlens == (4, 0, 5)
    assert (found.total, found.longest) == (9, 5)
    empty = host_lengths("cu_seqlens_q", lengths(0, device=device))
    assert (empty.seqlens, empty.total, empty.longest) == ((), 0, 0)


def test_equal_lengths_are_one_object(device: torch.device) -> None:
    first = host_lengths("cu_seqlens_q", lengths(0, 4, 9, device=device))
    for same in ([0, 4, 9], (0, 4, 9), lengths(0, 4, 9, device=device)):
        assert host_lengths("cu_seqlens_q", same) is first


def test_a_device_tensor_is_copied_once_for_all_calls(npu: torch.device) -> None:
    packed, cu_q, cu_k = qkv(), lengths(0, 4, 9), lengths(0, 4, 9)
    q, k, v = packed.unbind(1)
    assert copies(lambda: flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 5)) == 2
    for causal in (False, True):
        assert (
            copies(lambda c=causal: flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 5, causal=c))
            == 0
        )
    assert copies(lambda: flash_attn_varlen_kvpacked_func(q, packed[:, 1:], cu_q, cu_k, 5, 5)) == 0
    assert copies(lambda: flash_attn_varlen_qkvpacked_func(packed, cu_k, 5)) == 0


def test_the_same_tensor_for_both_sides_is_copied_once(npu: torch.device) -> None:
    packed, cu = qkv(), lengths(0, 4, 9)
    assert copies(lambda: flash_attn_varlen_qkvpacked_func(packed, cu, 5)) == 1
    q, k, v = packed.unbind(1)
    assert copies(lambda: flash_attn_varlen_func(q, k, v, cu, cu, 5, 5)) == 0


def test_the_backward_copies_nothing_more(npu: torch.device) -> None:
    packed, cu = qkv().requires_grad_(), lengths(0, 4, 9)

    # the composed kernel, whose backward reads the lengths again
    def step() -> None:
        flash_attn_varlen_qkvpacked_func(packed, cu, 5, softcap=5.0).sum().backward()

    assert copies(step) == 1
    assert copies(step) == 0


@pytest.mark.parametrize("make", [list, tuple, lambda values: lengths(*values, device="cpu")])
def test_what_lies_on_the_host_is_not_copied(make: Callable[[Any], Any], npu: torch.device) -> None:
    q, k, v = qkv().unbind(1)
    with virtual_ascend.record() as rec:
        flash_attn_varlen_func(q, k, v, make((0, 4, 9)), make((0, 4, 9)), 5, 5)
    assert not rec.device_to_host
    assert not rec.host_to_device
    assert rec.launches[0].arguments["actual_seq_qlen"] == [4, 9]


def test_what_we_are_told_is_not_copied(npu: torch.device) -> None:
    cu = lengths(0, 4, 9)
    remember_lengths(cu, (0, 4, 9))
    assert copies(lambda: read(cu)) == 0
    cu[1] = 3
    assert read(cu) == (0, 3, 9)


def _without_grad(cu: Tensor) -> None:
    with torch.no_grad():
        cu[1] = 2


def _in_inference_mode(cu: Tensor) -> None:
    with torch.inference_mode():
        cu[1] = 2


def _view_made_in_inference_mode(cu: Tensor) -> None:
    with torch.inference_mode():
        cu[1:].sub_(1)


def _assigned(cu: Tensor) -> None:
    cu.data = lengths(0, 2, 9, device=cu.device)


CHANGES: dict[str, Change] = {
    "item": lambda cu: cu.__setitem__(1, 2),
    "slice": lambda cu: cu[1:].fill_(6),
    "copy_": lambda cu: cu.copy_(lengths(0, 1, 2, device=cu.device)),
    "mul_": lambda cu: cu.mul_(2),
    "zero_": lambda cu: cu.zero_(),
    "out=": lambda cu: torch.add(cu, cu, out=cu),
    "view": lambda cu: cu.view(3, 1)[1].fill_(7),
    "detached": lambda cu: cu.detach().__setitem__(1, 1),
    "cumsum": lambda cu: torch.cumsum(lengths(0, 3, 3, device=cu.device), 0, out=cu),
    "resize_": lambda cu: cu.resize_(2),
    "set_": lambda cu: cu.set_(lengths(0, 1, 2, 3, device=cu.device)),
    "no_grad": _without_grad,
    "inference mode": _in_inference_mode,
    "view made in inference mode": _view_made_in_inference_mode,
    ".data =": _assigned,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_noticed(change: str, device: torch.device) -> None:
    cu = lengths(0, 4, 9, device=device)
    assert read(cu) == (0, 4, 9)
    assert host_ends("cu_seqlens_q", cu) == [4, 9]
    CHANGES[change](cu)
    assert cu.dtype == torch.int32
    assert read(cu) == tuple(cu.tolist()) != (0, 4, 9)
    assert host_ends("cu_seqlens_q", cu) == cu.tolist()[1:]


def test_a_change_through_the_base_of_a_view_is_noticed(device: torch.device) -> None:
    base = lengths(0, 0, 4, 9, 9, device=device)
    cu = base[1:4]
    assert read(cu) == (0, 4, 9)
    base[2] = 5
    assert read(cu) == (0, 5, 9)


def test_a_change_reaches_the_kernel(npu: torch.device) -> None:
    packed, cu = qkv(), lengths(0, 4, 9)
    whole = flash_attn_varlen_qkvpacked_func(packed, lengths(0, 7, 9), 9)
    assert not torch.equal(flash_attn_varlen_qkvpacked_func(packed, cu, 9).cpu(), whole.cpu())
    cu[1] = 7
    assert torch.equal(flash_attn_varlen_qkvpacked_func(packed, cu, 9).cpu(), whole.cpu())


def test_a_shorter_tensor_over_the_same_memory_is_noticed(npu: torch.device) -> None:
    cu = lengths(0, 4, 9)
    assert read(cu) == (0, 4, 9)
    cu.data = cu.data[:2]
    assert read(cu) == (0, 4)


def test_a_write_through_data_is_not_noticed_on_a_device_as_documented(npu: torch.device) -> None:
    cu = lengths(0, 4, 9)
    assert read(cu) == (0, 4, 9)
    cu.data.copy_(lengths(0, 1, 9))
    # PyTorch shows it to nobody; a copy per call would be the only cure
    assert read(cu) == (0, 4, 9)
    forget_lengths()
    assert read(cu) == (0, 1, 9)
    assert "through `.data` cannot be" in " ".join(str(flash_attn_varlen_func.__doc__).split())
    assert "`tensor.data`" in str(PerTensorMemo.__doc__)


def test_a_write_through_data_is_noticed_on_the_host() -> None:
    cu = lengths(0, 4, 9, device="cpu")
    assert read(cu) == (0, 4, 9)
    cu.data.copy_(lengths(0, 1, 9, device="cpu"))
    assert read(cu) == (0, 1, 9)


def test_tensors_of_inference_mode_are_read_at_every_call(npu: torch.device) -> None:
    with torch.inference_mode():
        cu = lengths(0, 4, 9)
        assert read(cu) == (0, 4, 9)
        cu[1] = 5
        assert read(cu) == (0, 5, 9)
        cu[1:].sub_(1)
        assert read(cu) == (0, 4, 8)
        assert copies(lambda: read(cu)) == 1
        remember_lengths(cu, (0, 4, 8))
        cu[1] = 5
        assert read(cu) == (0, 5, 8)
    assert read(cu) == (0, 5, 8)


def test_other_tensors_are_remembered_in_inference_mode(npu: torch.device) -> None:
    cu = lengths(0, 4, 9)
    with torch.inference_mode():
        assert copies(lambda: read(cu)) == 1
        assert copies(lambda: read(cu)) == 0


def test_a_new_tensor_in_the_place_of_an_old_one_is_read(npu: torch.device) -> None:
    places, objects = set(), set()
    for i in range(300):
        cu = lengths(0, i, 400)
        places.add(cu.data_ptr())
        objects.add(id(cu))
        assert read(cu) == (0, i, 400)
        assert host_ends("cu_seqlens_q", cu) == [i, 400]
        del cu
    # otherwise nothing was tried
    assert len(places) < 300
    assert len(objects) < 300


def test_clones_and_views_are_tensors_of_their_own(npu: torch.device) -> None:
    cu = lengths(0, 4, 9)
    read(cu)
    for other in (cu.clone(), cu[:2], cu.view(-1)):
        assert copies(lambda other=other: read(other)) == 1
        assert read(other) == tuple(other.tolist())


def test_wrong_lengths_are_not_remembered(npu: torch.device) -> None:
    cu = lengths(0, 9, 4)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="never decrease"):
            read(cu)
    cu[1] = 2
    assert read(cu) == (0, 2, 4)


def test_the_memory_is_bounded_and_lets_go(npu: torch.device) -> None:
    memo: PerTensorMemo[int] = PerTensorMemo("of this test", 4)
    alive = [lengths(i) for i in range(10)]
    for i, tensor in enumerate(alive):
        assert memo.get(tensor, lambda x: x.item()) == i
        assert len(memo) <= 4
    # the oldest made room
    assert [memo.known(tensor) for tensor in alive] == [None] * 6 + [6, 7, 8, 9]
    del tensor
    alive.clear()
    # what was read of a tensor goes with it
    assert len(memo) == 0
    keep = lengths(1)
    memo.get(keep, lambda x: x.item())
    memo.clear()
    assert memo.known(keep) is None
    del memo
    assert all(memo.name != "of this test" for memo in memos())


def test_more_tensors_than_are_remembered(npu: torch.device) -> None:
    tensors = [lengths(0, i) for i in range(3 * MEMO_SIZE)]
    for _ in range(2):
        assert [read(cu)[1] for cu in tensors] == list(range(3 * MEMO_SIZE))


def test_threads_never_see_lengths_of_others(npu: torch.device) -> None:
    shared, wrong = [lengths(0, i) for i in range(100)], []

    def hammer(number: int) -> None:
        torch.npu.set_device(npu)
        try:
            for i in range(300):
                own = lengths(0, number, 1000 + i)
                found = read(own), read(own), read(shared[i % 100])
                own[1] = number + 1
                if (*found, read(own)) != (
                    *((0, number, 1000 + i),) * 2,
                    (0, i % 100),
                    (0, number + 1, 1000 + i),
                ):
                    wrong.append((number, i, found))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_has_its_parents_lengths_and_its_own(npu: torch.device) -> None:
    known, other = lengths(0, 4, 9), lengths(0, 5, 9, device="cpu")
    read(known)
    q, k, v = qkv("cpu").unbind(1)
    expected = flash_attn_varlen_func(q, k, v, other, other, 5, 5)

    def child() -> bool:
        out = flash_attn_varlen_func(q, k, v, other, other, 5, 5)
        same = read(known) == (0, 4, 9) and torch.equal(out, expected)
        other[1] = 6
        return same and read(other) == (0, 6, 9) and read([0, 1]) == (0, 1)

    assert exit_code_of(child) == 0
    assert read(other) == (0, 5, 9)

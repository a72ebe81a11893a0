"""Many sequences cost no step for each: those of one pair of lengths are computed together.

Equal ones lie side by side, or between others, and those are gathered and put back.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._core.ground.memory import forget_all, memos
from flash_attn_npu._core.kernels.composed import attention as blockwise
from tests.helpers import argument_harness as harness
from tests.helpers.composed_only import composed_only
from tests.helpers.strategies import Problem

P = 0.4
SIDE_BY_SIDE = ((3, 5),) * 5 + ((2, 2),) * 4 + ((0, 3),) * 2 + ((4, 0),) * 2
ALTERNATING = ((3, 5), (2, 2), (0, 3), (1, 1), (4, 0), (0, 0), (9, 4)) * 4
CASES = {"side by side": SIDE_BY_SIDE, "alternating": ALTERNATING}

kinds = pytest.mark.parametrize("seqlens", CASES.values(), ids=CASES)


def problem_of(seqlens: tuple[tuple[int, int], ...], **fields) -> Problem:
    return Problem(seqlens, nheads_k=2, group=2, tail_q=3, tail_k=2, **fields)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the composed computations of tiles, one for each group of sequences."""
    computed: list[str] = []
    for name in ("attend", "attend_backward"):
        original = getattr(blockwise, name)

        def counted(*args, name=name, original=original) -> None:
            computed.append(name)
            original(*args)

        monkeypatch.setattr(blockwise, name, counted)
    with composed_only():
        yield computed


@kinds
@pytest.mark.parametrize("fields", [{}, {"causal": True}, {"window_size": (2, 1)}], ids=str)
def test_values_and_gradients(device, seqlens, fields):
    problem = problem_of(seqlens, **fields)
    call = harness.arguments_for(flash_attn_varlen_func, problem) | {"softcap": 5.0}
    answer = harness.run(flash_attn_varlen_func, call, device)
    harness.assert_right(answer, harness.truth(flash_attn_varlen_func, call))


@kinds
def test_every_sequence_has_its_own_slopes(device, seqlens):
    problem = problem_of(seqlens, causal=True)
    call = harness.arguments_for(flash_attn_varlen_func, problem)
    call |= {"alibi_slopes": torch.rand(len(seqlens), problem.nheads)}
    answer = harness.run(flash_attn_varlen_func, call, device)
    harness.assert_right(answer, harness.truth(flash_attn_varlen_func, call))


@kinds
def test_every_sequence_has_its_own_mask_in_both_directions(device, seqlens):
    torch.manual_seed(0)
    call = harness.arguments_for(flash_attn_varlen_func, problem_of(seqlens))
    call |= {"dropout_p": P, "return_attn_probs": True}
    answer = harness.run(flash_attn_varlen_func, call, device)
    masks = harness.masks_from(answer["s_dmask"], call)
    alike = [mask for mask in masks if mask.shape[1:] == (3, 5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(alike) for b in alike[:i])
    call["dropout_mask"] = masks
    harness.assert_right(answer, harness.truth(flash_attn_varlen_func, call))


@kinds
def test_buffers_are_written_where_they_lie(device, seqlens):
    function = interface._flash_attn_varlen_backward
    forward = interface._flash_attn_varlen_forward
    problem = problem_of(seqlens, causal=True)
    first = harness.run(forward, harness.arguments_for(forward, problem) | {"softcap": 5.0}, device)
    call = harness.arguments_for(function, problem) | {"softcap": 5.0}
    call |= {x: first[x].cpu() for x in ("out", "softmax_lse", "rng_state")}
    strided = {
        f"d{x}": torch.full((*call[x].shape, 2), torch.nan, dtype=problem.dtype)[..., 0]
        for x in "qkv"
    }
    answer = harness.run(function, call | strided, device)
    harness.assert_right(answer, harness.truth(function, call))


def test_row_sums_of_many_sequences(device):
    """Sequence i starts at the multiple of 128 below cu_seqlens_q[i] + 128 * i."""
    lengths = [5, 0, 200, 1, 1, 130]
    cu = torch.tensor(lengths).cumsum(0).int()
    cu = torch.nn.functional.pad(cu, (1, 0)).to(device)
    total = int(cu[-1])
    q = torch.randn(total + 4, 1, 8, device=device)
    out, lse, _, rng = interface._flash_attn_varlen_forward(
        q, q, q, cu, cu, 200, 200, 0.0, 0.3, False
    )
    dout = torch.randn_like(q)
    grads = [torch.empty_like(q) for _ in range(3)]
    given = interface._flash_attn_varlen_backward(
        dout, q, q, q, out, lse, *grads, cu, cu, 200, 200, 0.0, 0.3, False, -1, -1, 0.0, None,
        False, rng,
    )  # fmt: skip
    expected = torch.zeros(1, q.shape[0] + 128 * len(lengths))
    delta = (dout.cpu() * out.cpu()).sum(-1).t()
    for i, (start, length) in enumerate(zip(cu.tolist(), lengths, strict=False)):
        first = (start + 128 * i) // 128 * 128
        expected[:, first : first + length] = delta[:, start : start + length]
    torch.testing.assert_close(given.cpu(), expected)


@pytest.mark.parametrize("lengths", [[1], [1, 3, 2]], ids=["equal", "alternating"])
def test_the_steps_do_not_grow_with_the_sequences(tiles, lengths):
    count = 3000
    cu = torch.tensor([0, *lengths * (count // len(lengths))]).cumsum(0).int()
    q = torch.randn(int(cu[-1]), 2, 8, requires_grad=True)
    flash_attn_varlen_func(q, q, q, cu, cu, 3, 3, causal=True).sum().backward()
    assert sorted(set(tiles)) == ["attend", "attend_backward"]
    assert len(tiles) == 2 * len(lengths)
    # a cache, and pages, whose keys are gathered
    cache = torch.randn(count, 16, 1, 8)
    table = torch.arange(count, dtype=torch.int32)[:, None]
    tiles.clear()
    flash_attn_with_kvcache(q[:count, None].detach(), cache, cache, block_table=table)
    assert tiles == ["attend"]


def test_long_sequences_are_not_copied(tiles):
    cu = torch.tensor([0, *[2000, 1] * 3]).cumsum(0).int()
    q = torch.randn(int(cu[-1]), 1, 8)
    flash_attn_varlen_func(q, q, q, cu, cu, 2000, 2000)
    assert len(tiles) == 3 + 1


def test_rows_without_queries_take_no_steps(tiles):
    nothing = torch.zeros(100_000, 0, 1, 8, requires_grad=True)
    keys = torch.zeros(100_000, 2, 1, 8, requires_grad=True)
    out = flash_attn_func(nothing, keys, keys)
    assert out.shape == nothing.shape
    out.sum().backward()
    assert not keys.grad.any()
    assert len(tiles) < 20


def test_memos_of_lengths_are_bounded_by_bytes():
    """A thousand lists of 10,000 lengths would be gigabytes of integers."""
    forget_all()
    q = torch.zeros(1, 1, 8)
    for i in range(30):
        cu = torch.zeros(20_001, dtype=torch.int32)
        cu[i + 1 :] = 1
        flash_attn_varlen_func(q, q, q, cu, cu, 1, 1)
    for memo in memos():
        if memo.nbytes is not None:
            assert memo.held() <= memo.nbytes
    by_values = {memo.name: len(memo) for memo in memos()}
    assert 0 < by_values["cumulative lengths by their values"] < 30
    assert 0 < by_values["plans of calls"] < 30


def test_positions_in_caches_are_bounded_by_bytes():
    forget_all()
    (where,) = (memo for memo in memos() if memo.name == "positions in caches")
    cache = torch.zeros(64, 8192, 1, 1)
    q = torch.zeros(64, 1, 1, 1)
    for length in range(8180, 8190):
        # without a softcap keys are read where they lie
        flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length, softcap=1.0)
    assert where.nbytes is not None
    assert 0 < where.held() <= where.nbytes == 1 << 26
    assert 0 < len(where) < 10
    flash_attn_npu.forget_lengths()
    assert where.held() == 0


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements torch.tensor made: what is built from host values."""
    made, original = [], torch.tensor

    def counted(*args, **kwargs) -> Tensor:
        tensor = original(*args, **kwargs)
        made.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "tensor", counted)
    return made


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_is_checked_by_pages_not_by_positions(looked_at, monkeypatch, paged):
    """One more position of 32k is no reason to look at all of them."""
    from flash_attn_npu._core.problems.cache import Cache, Span

    repeats = []
    repeat = torch.repeat_interleave
    monkeypatch.setattr(
        torch, "repeat_interleave", lambda *a, **k: repeats.append(1) or repeat(*a, **k)
    )
    if paged:
        table = torch.arange(512, dtype=torch.int32).view(4, 128)
        table[2, 127] = -7
        cache = Cache(*torch.zeros(2, 512, 256, 1, 1), 4, table, None)
    else:
        cache = Cache(*torch.zeros(2, 4, 32768, 1, 1), 4, None, None)
    looked_at.clear()
    for length in (32000, 32001):
        cache.check([Span(0, length)] * 4)
    assert not repeats
    assert sum(looked_at) <= 2 * (512 + 8)
    if paged:
        cache.check([Span(0, 32768)] * 2 + [Span(0, 32512)] + [Span(0, 32768)])
        for spans in ([Span(0, 32513)] * 4, [Span(32512, 32768)] * 4):
            with pytest.raises(flash_attn_npu.errors.ArgumentError, match="id -7 for sequence 2"):
                cache.check(spans)
        cache.check([Span(0, 4)] * 2 + [Span(32600, 32600)] + [Span(0, 4)])

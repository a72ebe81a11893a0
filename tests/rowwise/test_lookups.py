"""Rotations at positions in a tensor: one launch that looks the rows of known tables up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.kernels.ascend import lookup
from flash_attn_npu._core.problems.rowwise import Turn
from flash_attn_npu._core.rowwise.rotation import rotate_alike
from flash_attn_npu.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn_npu.ops.triton.rotary import apply_rotary
from tests.helpers.fused_cases import close as close_to_exact

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
STARTS = [5, 0, 11]


@pytest.fixture(autouse=True)
def fresh(npu: torch.device) -> None:
    forget_all()
    torch.manual_seed(0)


def tables(device: torch.device, width: int = 64, dtype: torch.dtype = BRAIN) -> list[Tensor]:
    """Those of an embedding, which nobody else writes to."""
    angle = torch.randn(20, width // 2)
    cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    lookup.keep(cos, sin)
    return [cos, sin]


def starts(device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(STARTS, dtype=dtype).to(device)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, at: list[int]) -> Tensor:
    """In float64, x (batch, seqlen, ..., headdim)."""
    x, cos, sin = (t.detach().cpu().double() for t in (x, cos, sin))
    rows = torch.tensor(at)[:, None] + torch.arange(x.shape[1])
    shape = (*rows.shape, *[1] * (x.dim() - 3), cos.shape[1])
    c, s = cos[rows].view(shape), sin[rows].view(shape)
    head, rest = x[..., : 2 * cos.shape[1]], x[..., 2 * cos.shape[1] :]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pairs = (a * c - b * s, a * s + b * c)
    head = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((head, rest), -1)


def asked(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the third call gives and asks for: its tables came before, and were put together."""
    run()
    run()
    with virtual_ascend.record() as seen:
        out = run()
    return out, [name.rpartition("::")[2] for name in seen.operators]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seqlen", [1, 3])
@pytest.mark.parametrize(("dtype", "width"), [(HALF, 64), (BRAIN, 128), (FULL, 48)])
def test_one_launch(
    npu: torch.device, dtype: torch.dtype, width: int, seqlen: int, interleaved: bool
) -> None:
    x, (cos, sin) = torch.randn(3, seqlen, 4, width).to(npu, dtype), tables(npu, width, dtype)
    # every query of a step is at its own row; int64 needs no cast before
    at = starts(npu, torch.int64)
    with reporting() as report:
        out, names = asked(lambda: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=at))
    assert names[-1] == "npu_mrope"
    assert names == ["npu_mrope"] if seqlen == 1 else "index_select" not in names
    calls = {entry.kernel: entry.calls for entry in report.tallies}
    assert calls == {"npu_mrope": 3}
    assert out.shape == x.shape
    assert out.is_contiguous()
    close_to_exact(out, turned(x, cos, sin, interleaved, STARTS))


def test_a_step_over_a_cache_asks_once_for_q_and_k(npu: torch.device) -> None:
    """In every layer, and the positions go to the card once for all of them."""
    q, k, v = (torch.randn(3, 1, n, 64).to(npu, BRAIN) for n in (4, 2, 2))
    cos, sin = tables(npu)
    at = starts(npu)
    caches = [torch.zeros(3, 32, 2, 64).to(npu, BRAIN) for _ in "kv"]

    def step() -> Any:
        return flash_attn_with_kvcache(
            q, *caches, k, v, cos, sin, cache_seqlens=at, causal=True, rotary_interleaved=False
        )

    step()
    out, names = asked(step)
    assert names.count("npu_mrope") == 1
    assert not {"npu_rotary_mul", "index_select", "cat", "arange", "_to_copy"} & set(names), names
    with virtual_ascend.record() as seen:
        step()
    assert not seen.device_to_host
    assert not seen.host_to_device
    turned_q = turned(q, cos, sin, False, STARTS)
    for i, start in enumerate(STARTS):
        close_to_exact(caches[0][i, start], turned(k, cos, sin, False, STARTS)[i, 0])
        keys, values = (c[i, : start + 1].cpu().double().repeat_interleave(2, 1) for c in caches)
        scores = torch.einsum("hd,khd->hk", turned_q[i, 0], keys) / 8
        want = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
        assert (out[i, 0].cpu().double() - want).abs().max() < 0.02


@pytest.mark.parametrize("heads", [(2, 1), (40, 8)])
def test_packed_qkv_is_written_where_it_lies(npu: torch.device, heads: tuple[int, int]) -> None:
    """Two launches; three where q and k are wider together than what the operator takes."""
    n, n_k = heads
    cos, sin = tables(npu, 128)
    at = starts(npu, torch.int64)
    first = torch.randn(3, 1, n + 2 * n_k, 128).to(npu, BRAIN)
    qkv = first.clone()

    def run() -> Tensor:
        qkv.copy_(first)
        return apply_rotary_emb_qkv_(qkv, cos, sin, seqlen_offsets=at, num_heads_q=n)

    out, names = asked(run)
    copies = 1 if (n + n_k) * 128 <= 4096 else 2
    assert names == ["copy_", "npu_mrope", *["copy_"] * copies]
    assert out is qkv
    close_to_exact(qkv[:, :, : n + n_k], turned(first, cos, sin, False, STARTS)[:, :, : n + n_k])
    assert torch.equal(qkv[:, :, n + n_k :], first[:, :, n + n_k :])


def test_packed_kv_and_the_module(npu: torch.device) -> None:
    kv, (cos, sin) = torch.randn(3, 1, 2, 2, 64).to(npu, BRAIN), tables(npu)
    at = starts(npu, torch.int64)
    before = kv.clone()
    apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=at)
    kv.copy_(before)
    with virtual_ascend.record() as seen:
        apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=at)
    assert [launch.name for launch in seen.launches] == ["npu_mrope"]
    close_to_exact(kv[:, :, 0], turned(before[:, :, 0], cos, sin, False, STARTS))
    assert torch.equal(kv[:, :, 1], before[:, :, 1])
    module = RotaryEmbedding(64).to(npu)
    qkv = torch.randn(3, 1, 3, 2, 64).to(npu, BRAIN)
    for _ in range(2):
        with virtual_ascend.record() as seen:
            module(qkv, seqlen_offset=at, max_seqlen=20)
    assert [launch.name for launch in seen.launches] == ["npu_mrope"]


def test_packed_sequences(npu: torch.device) -> None:
    x, (cos, sin) = torch.randn(6, 2, 64).to(npu, BRAIN), tables(npu)
    cu_seqlens = torch.tensor([0, 2, 3, 6], dtype=torch.int32).to(npu)
    given = {"seqlen_offsets": starts(npu), "cu_seqlens": cu_seqlens, "max_seqlen": 3}
    out, names = asked(lambda: apply_rotary_emb(x, cos, sin, **given))
    assert names.count("npu_mrope") == 1
    assert "index_select" not in names
    for first, end, start in zip([0, 2, 3], [2, 3, 6], STARTS, strict=True):
        want = turned(x[None, first:end], cos, sin, False, [start])[0]
        close_to_exact(out[first:end], want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a packed qkv": lambda x: x[:, :, 1:4],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :3],
    "one token for all": lambda x: x[:1, :, :3].expand(3, -1, -1, -1),
    "from an odd place": lambda x: x.flatten()[3 : 3 + 3 * 2 * 3 * 64].view(3, 2, 3, 64),
    "every other dimension": lambda x: torch.stack((x, x), -1).flatten(-2)[:, :, :3, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strided_tensors(npu: torch.device, name: str) -> None:
    """What the kernel cannot read where it lies is copied; nothing is read elsewhere."""
    x = LAYOUTS[name](torch.randn(3, 2, 5, 64).to(npu, BRAIN))
    (cos, sin), at = tables(npu), starts(npu)
    out, names = asked(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=at))
    assert names[-1] == "npu_mrope"
    assert ("clone" in names) == (name not in ("of a packed qkv",))
    assert out.is_contiguous()
    close_to_exact(out, turned(x, cos, sin, False, STARTS))


def test_changed_tables_are_never_stale(npu: torch.device) -> None:
    x, (cos, sin), at = torch.randn(3, 1, 2, 64).to(npu, BRAIN), tables(npu), starts(npu)
    for change in (lambda: cos.neg_(), lambda: sin.mul_(0.5), lambda: cos.zero_()):
        for _ in range(3):
            out = apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
            close_to_exact(out, turned(x, cos, sin, False, STARTS))
        change()
        out = apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
        close_to_exact(out, turned(x, cos, sin, False, STARTS))
    # the same cos beside another sin
    for other in (sin.clone(), -sin, sin):
        for _ in range(2):
            out = apply_rotary_emb(x, cos, other, seqlen_offsets=at)
            close_to_exact(out, turned(x, cos, other, False, STARTS))


def test_tables_of_one_call_give_their_rows_alone(npu: torch.device) -> None:
    """Which are put side by side, for the same kernel: a result has the bits of the next one."""
    x, (cos, sin) = torch.randn(3, 1, 2, 64).to(npu, BRAIN), tables(npu)
    at = starts(npu, torch.int64)
    rows = ["index_select", "index_select", "cat", "npu_mrope"]
    for _ in range(3):
        known, names = asked(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=at))
        fresh, anew = asked(lambda: apply_rotary_emb(x, cos[:], sin[:], seqlen_offsets=at))
        assert (names, anew) == (["npu_mrope"], rows)
        assert torch.equal(known, fresh)
    with torch.inference_mode():
        made_there = [cos.clone(), sin.clone()]
        out, names = asked(lambda: apply_rotary_emb(x, *made_there, seqlen_offsets=at))
    assert names == rows
    assert torch.equal(out, known)
    close_to_exact(out, turned(x, cos, sin, False, STARTS))


def test_a_table_goes_with_its_cos_and_sin(npu: torch.device, monkeypatch: Any) -> None:
    x, (cos, sin), at = torch.randn(3, 1, 2, 64).to(npu, BRAIN), tables(npu), starts(npu)
    for _ in range(2):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
    assert lookup._by_cos.held() == lookup._by_sin.held() == cos.nbytes + sin.nbytes
    monkeypatch.setattr(lookup, "MOST_BYTES", cos.nbytes - 1)
    del cos, sin
    assert len(lookup._by_cos) == len(lookup._by_sin) == 0
    cos, sin = tables(npu)
    _, names = asked(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=at))
    assert names[-4:] == ["index_select", "index_select", "cat", "npu_mrope"]
    assert not lookup._by_cos.held()


def test_tables_of_a_caller_are_read_at_every_call(npu: torch.device) -> None:
    """torch_npu's `_foreach_*_` move no version, by which moving averages write to buffers."""
    x, at = torch.randn(3, 1, 2, 64).to(npu, BRAIN), starts(npu)
    cos, sin = (t.to(npu, BRAIN) for t in torch.randn(2, 20, 32))
    for change in (torch._foreach_neg_, lambda ts: ts[0].data.zero_()):
        for _ in range(3):
            out = apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
            close_to_exact(out, turned(x, cos, sin, False, STARTS))
        change([cos, sin])
    close_to_exact(
        apply_rotary_emb(x, cos, sin, seqlen_offsets=at), turned(x, cos, sin, False, STARTS)
    )
    assert len(lookup._by_cos) == 0


def test_an_embedding_keeps_its_tables_after_all_is_forgotten(npu: torch.device) -> None:
    module, qkv = RotaryEmbedding(64).to(npu), torch.randn(3, 1, 3, 2, 64).to(npu, BRAIN)
    at = starts(npu, torch.int64)
    for _ in range(2):
        module(qkv, seqlen_offset=at, max_seqlen=20)
        flash_attn_npu.forget_lengths()
        module(qkv, seqlen_offset=at, max_seqlen=20)
        _, names = asked(lambda: module(qkv, seqlen_offset=at, max_seqlen=20))
        assert "index_select" not in names
        assert "npu_mrope" in names


@pytest.mark.parametrize("blocks", [65535, 65540, 65551, 65552])
def test_rows_far_apart(npu: torch.device, blocks: int) -> None:
    """The kernel counts the blocks between rows by 16 bits, for both tensors that it is given."""
    far = torch.randn(2, blocks * 16, dtype=BRAIN).to(npu)
    x, (cos, sin) = far[:, :256].unflatten(1, (1, 4, 64)), tables(npu)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=starts(npu)[:2])
    close_to_exact(out, turned(x, cos, sin, False, STARTS[:2]))


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32 tables": ({}, {"dtype": FULL}),
    "part of each head": ({}, {"width": 32}),
    "a headdim of 80": ({"width": 80}, {"width": 80}),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_it_does_not_take_is_looked_up_before(npu: torch.device, name: str) -> None:
    of_x, of_tables = OTHERWISE[name]
    x = torch.randn(3, 1, 2, of_x.get("width", 64)).to(npu, BRAIN)
    (cos, sin), at = tables(npu, **of_tables), starts(npu)
    out, names = asked(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=at))
    assert "npu_mrope" not in names
    assert "npu_rotary_mul" in names
    close_to_exact(out, turned(x, cos, sin, False, STARTS))
    assert not lookup._by_cos.held()


def test_more_heads_than_it_takes_go_in_two_halves(npu: torch.device) -> None:
    x, (cos, sin) = torch.randn(3, 1, 65, 64).to(npu, BRAIN), tables(npu)
    at = starts(npu, torch.int64)
    out, names = asked(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=at))
    assert names == ["npu_mrope", "cat"]
    close_to_exact(out, turned(x, cos, sin, False, STARTS))


@pytest.mark.parametrize("heads", [(40, 8), (96, 8), (130, 2), (81, 9)])
def test_a_step_of_more_heads_is_one_launch_too(npu: torch.device, heads: tuple[int, int]) -> None:
    """Each token is looked up as several: that of Qwen 32B has 40 heads of 128."""
    n = heads[0]
    width = 128 if n < 100 else 64
    q, k = (torch.randn(3, 1, h, width).to(npu, BRAIN) for h in heads)
    cos, sin = tables(npu, width)
    turn = Turn(torch.tensor(STARTS, dtype=torch.int32), function="f")

    def step() -> Any:
        return rotate_alike((q, k), cos, sin, turn)

    outs, names = asked(step)
    if n == 130:
        # neither half has few enough heads
        assert names.count("npu_rotary_mul") == 2
    else:
        assert names == ["npu_mrope"]
    for out, x in zip(outs, (q, k), strict=True):
        close_to_exact(out, turned(x, cos, sin, False, STARTS))


def test_a_captured_graph_looks_rows_up_itself(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept before a capture is not a part of it, and what is made there not a value."""
    x, (cos, sin), at = torch.randn(3, 1, 2, 64).to(npu, BRAIN), tables(npu), starts(npu)
    for _ in range(2):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True, raising=False)
    with virtual_ascend.record() as seen:
        apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
    assert [launch.name for launch in seen.launches] == ["npu_rotary_mul"]


def test_gradients(npu: torch.device) -> None:
    """The turn back looks rows up as ever, and the operator, which has no gradient, is not asked
    where autograd would have to know of it.
    """
    (cos, sin), at = tables(npu), starts(npu)
    x, dout = (torch.randn(3, 1, 2, 64).to(npu, BRAIN) for _ in range(2))
    for rotate in (apply_rotary_emb, apply_rotary):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            with virtual_ascend.record() as seen:
                out = rotate(leaf, cos, sin, seqlen_offsets=at)
            (dx,) = torch.autograd.grad(out, leaf, dout)
        served = ["npu_mrope" if rotate is apply_rotary_emb else "npu_rotary_mul"]
        assert [launch.name for launch in seen.launches] == served
        close_to_exact(out.detach(), turned(x, cos, sin, False, STARTS))
        close_to_exact(dx, turned(dout, cos, -sin, False, STARTS))
        # what is returned may be written to
        out = rotate(leaf, cos, sin, seqlen_offsets=at)
        out.mul_(2)
        assert torch.equal(torch.autograd.grad(out, leaf, dout)[0], 2 * dx)


def test_bad_positions_are_refused_as_ever(npu: torch.device) -> None:
    x, (cos, sin) = torch.randn(3, 1, 2, 64).to(npu, BRAIN), tables(npu)
    at = starts(npu)
    for _ in range(2):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=at)
    before = x.clone()
    for bad in (at[:2], at.float(), torch.tensor([0, 20, 1]), [5, 0, 11]):
        with pytest.raises((flash_attn_npu.ArgumentError, flash_attn_npu.ArgumentTypeError)):
            apply_rotary_emb(x, cos, sin, inplace=True, seqlen_offsets=bad)
    assert torch.equal(x, before)

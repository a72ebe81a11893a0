"""Clients that split sequences over devices, and so call the functions below the public ones:
ring-flash-attention, yunchang, DeepSpeed, TransformerEngine, ms-swift, nanotron, fla."""

from __future__ import annotations

import importlib.metadata
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from tests.helpers.client_references import (
    assert_gives,
    assert_gradients,
    assert_lse,
    attention,
    packed,
)
from tests.helpers.probes import cumulative, default_arguments, importable, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

HALF, SEQLEN, NHEADS, HEADDIM = 4, 8, 2, 16
SCALE = HEADDIM**-0.5


def merged(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse (batch, seqlen, nheads[, headdim]) of several blocks of keys, in float32."""
    lse = torch.stack(lses).logsumexp(0)
    parts = [o.float() * (x - lse).exp()[..., None] for o, x in zip(outs, lses, strict=True)]
    return torch.stack(parts).sum(0), lse


def test_ring_flash_attention(device: torch.device) -> None:
    """ring_flash_attn/zigzag_ring_flash_attn.py on the first of two devices: arguments read off
    _flash_attn_forward and _flash_attn_backward, gradients into slices of larger buffers."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def call(function: Any, **changes: Any) -> Any:
        params = default_arguments(function)
        # version 2.7 split the pair in two; older names must not be there
        assert "window_size" not in params
        params.update(window_size_left=-1, window_size_right=-1, dropout_p=0, softmax_scale=SCALE)
        return function(**{**params, **changes})

    # the device holds the first and the last quarter of the queries, the other one the middle
    whole = [randn(device, 1, 2 * SEQLEN, NHEADS, HEADDIM) for _ in "qkvd"]
    mine = torch.cat((torch.arange(HALF), torch.arange(3 * HALF, 4 * HALF))).to(device)
    others = torch.arange(HALF, 3 * HALF, device=device)
    q, k, v, dout = (x[:, mine] for x in whole)
    far_k, far_v = (x[:, others] for x in whole[1:3])
    buffers = [torch.full_like(x, torch.nan) for x in (q, k, v)]

    outputs = call(_flash_attn_forward, q=q, k=k, v=v, causal=True, return_softmax=False)
    assert len(outputs) == 4
    out, near, _, _ = outputs
    # only the last quarter of the queries sees the keys of the other device
    far_out, far, *_ = call(_flash_attn_forward, q=q[:, HALF:], k=far_k, v=far_v, causal=False)
    lse = near.transpose(1, 2).clone()
    last, last_lse = merged([out[:, HALF:], far_out], [lse[:, HALF:], far.transpose(1, 2)])
    out = torch.cat((out[:, :HALF].float(), last), 1).to(q.dtype)
    lse = torch.cat((lse[:, :HALF], last_lse), 1).transpose(1, 2).contiguous()
    ours = [*whole[:3]]

    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True)[:, mine.cpu()]

    assert_gives(out, seen, *ours)

    common = {"alibi_slopes": None, "deterministic": False}
    names = ("dq", "dk", "dv")
    call(
        _flash_attn_backward, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, causal=True,
        **dict(zip(names, buffers, strict=True)), **common,
    )  # fmt: skip
    dq, dk, dv = (x.float() for x in buffers)
    slices = [buffers[0][:, :HALF], torch.full_like(far_k, torch.nan), torch.empty_like(far_v)]
    call(
        _flash_attn_backward, dout=dout[:, HALF:], q=q[:, HALF:], k=far_k, v=far_v,
        out=out[:, HALF:], softmax_lse=lse.chunk(2, dim=2)[1].contiguous(), causal=False,
        **dict(zip(names, slices, strict=True)), **common,
    )  # fmt: skip
    dq[:, HALF:] += buffers[0][:, :HALF]
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in ours]
    gradients[0][:, mine] = dq
    for total, near_part, far_part in zip(gradients[1:], (dk, dv), slices[1:], strict=True):
        total[:, mine], total[:, others] = near_part, far_part.float()
    assert_gradients([x.to(q.dtype) for x in gradients], dout, seen, *ours)


def test_yunchang(device: torch.device, flash_attn: ModuleType) -> None:
    """yunchang/kernels/attention.py: versions compared as strings; gradients by position."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    assert not importable("flash_attn_interface")
    assert not flash_attn.__version__ <= "2.6.3"

    q, k, v, dout = (randn(device, 2, SEQLEN, NHEADS, HEADDIM) for _ in "qkvd")
    out, lse, _, _ = _flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=SCALE, causal=True, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    assert_gives(out, attention, q, k, v, causal=True)
    assert_lse(lse, q, k, v, causal=True)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _flash_attn_backward(
        dout, q, k, v, out, lse, *grads, 0.0, SCALE, True, -1, -1, 0.0, None, True, None
    )
    assert_gradients(grads, dout, attention, q, k, v, causal=True)


def test_deepspeed(device: torch.device) -> None:
    """deepspeed/sequence/fpdt_layer.py: chunks of a sequence, one after the other, backward with
    the lse of all chunks."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    q, k, v, dout = (randn(device, 1, SEQLEN, NHEADS, HEADDIM) for _ in "qkvd")
    queries, keys, values, douts = (x.chunk(2, dim=1) for x in (q, k, v, dout))
    options = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0}

    outs, lses = [], []
    for i, query in enumerate(queries):
        parts = [
            _flash_attn_forward(
                query, keys[j], values[j], 0.0, SCALE, causal=i == j, **options,
                alibi_slopes=None, return_softmax=False,
            )[:2]
            for j in range(i + 1)
        ]  # fmt: skip
        out, lse = merged([o for o, _ in parts], [x.permute(0, 2, 1) for _, x in parts])
        outs.append(out.to(q.dtype))
        lses.append(lse.permute(0, 2, 1).contiguous())
    assert_gives(torch.cat(outs, 1), attention, q, k, v, causal=True)

    sums = [torch.zeros(x.shape, device=device) for x in (q, k, v)]
    for j in range(2):
        for i in range(j, 2):
            grads = [torch.zeros_like(x) for x in (queries[i], keys[j], values[j])]
            _flash_attn_backward(
                douts[i], queries[i], keys[j], values[j], outs[i], lses[i], *grads, 0.0, SCALE,
                i == j, **options, alibi_slopes=None, deterministic=False, rng_state=None,
            )  # fmt: skip
            for total, grad, chunk in zip(sums, grads, (i, j, j), strict=True):
                total.chunk(2, dim=1)[chunk].add_(grad)
    assert_gradients([x.to(q.dtype) for x in sums], dout, attention, q, k, v, causal=True)


def test_transformer_engine(device: torch.device) -> None:
    """transformer_engine/pytorch/attention/dot_product_attention/backends.py and context_parallel:
    a range of versions, FA3 by its distribution, packed forward and backward."""
    assert Version("2.1.1") <= Version(importlib.metadata.version("flash-attn")) < Version("2.8.4")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-3")
    from flash_attn.flash_attn_interface import (
        _flash_attn_backward,
        _flash_attn_forward,
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
        flash_attn_func,
        flash_attn_varlen_func,
    )

    lengths = [3, 5]
    q, k, v, dout = (randn(device, 8, NHEADS, HEADDIM) for _ in "qkvd")
    cu_seqlens = cumulative(lengths, device)
    sizes = (cu_seqlens, cu_seqlens, 5, 5)
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": SCALE,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
    out, lse, _, rng_state = _flash_attn_varlen_forward(
        q, k, v, *sizes, **options, return_softmax=False, block_table=None, zero_tensors=False
    )
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, *sizes, **options, rng_state=rng_state,
        deterministic=False, zero_tensors=False,
    )  # fmt: skip
    assert_gives(out, packed, q, k, v, lengths_q=lengths, causal=True)
    assert_lse(lse, q, k, v, lengths=lengths, causal=True)
    assert_gradients(grads, dout, packed, q, k, v, lengths_q=lengths, causal=True)

    public = flash_attn_varlen_func(q, k, v, *sizes, 0.0, softmax_scale=SCALE, causal=True)
    assert torch.equal(public, out)
    q, k, v, dout = (x[None] for x in (q, k, v, dout))
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, **options, return_softmax=False)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _flash_attn_backward(
        dout, q, k, v, out, lse, *grads, **options, deterministic=False, rng_state=rng_state
    )
    assert_gradients(grads, dout, attention, q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, 0.0, softmax_scale=SCALE, causal=True), out)


def test_ms_swift(
    device: torch.device, flash_attn: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """swift/sequence_parallel and the muonclip optimizer: arguments read off
    _flash_attn_varlen_forward, functions of flash_attn replaced in place."""
    from flash_attn import flash_attn_interface

    arguments = default_arguments(flash_attn_interface._flash_attn_varlen_forward)
    cu_seqlens = cumulative([3, 5], device)
    q, k, v = (randn(device, 8, NHEADS, HEADDIM) for _ in "qkv")
    arguments.update(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=5,
        max_seqlen_k=5, dropout_p=0.0, softmax_scale=SCALE, causal=True, return_softmax=False,
    )  # fmt: skip
    out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(**arguments)
    assert_gives(out, packed, q, k, v, lengths_q=[3, 5], causal=True)
    assert_lse(lse, q, k, v, lengths=[3, 5], causal=True)

    original, calls = flash_attn.flash_attn_func, []

    def counting(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((q, k))
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(flash_attn, "flash_attn_func", counting)
    monkeypatch.setattr(flash_attn.flash_attn_interface, "flash_attn_func", counting)
    from flash_attn import flash_attn_func
    from flash_attn.flash_attn_interface import flash_attn_func as same

    assert flash_attn_func is same is counting
    flash_attn_func(q[None], k[None], v[None], causal=True)
    assert len(calls) == 1


def test_nanotron_ring(device: torch.device) -> None:
    """nanotron/nn/llama3_ring_attention.py: queries of one device against all keys before them,
    heads taken a few at a time."""
    from flash_attn.flash_attn_interface import (
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )

    # two documents of 3 and 9 tokens; this device holds the last six queries
    q, k, v = randn(device, 6, 4, HEADDIM), *(randn(device, 9, 2, HEADDIM) for _ in "kv")
    dout = randn(device, 6, 4, HEADDIM)
    sizes = (cumulative([6], device), cumulative([9], device), 6, 9)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    out, grads = [], [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for head in range(2):
        some = slice(2 * head, 2 * head + 2)
        forward = default_arguments(_flash_attn_varlen_forward)
        backward = default_arguments(_flash_attn_varlen_backward)
        shared = {
            **dict(zip(names, sizes, strict=True)),
            "q": q[:, some],
            "k": k[:, head : head + 1],
            "v": v[:, head : head + 1],
            "dropout_p": 0,
            "softmax_scale": SCALE,
            "causal": True,
            "alibi_slopes": None,
            "window_size_left": -1,
            "window_size_right": -1,
        }
        answer = _flash_attn_varlen_forward(**{**forward, **shared, "return_softmax": False})
        assert len(answer) == 4
        out.append(answer[0])
        into = [grads[0][:, some], *(x[:, head : head + 1] for x in grads[1:])]
        backward.update(shared, dout=dout[:, some], out=answer[0], softmax_lse=answer[1])
        backward.update(zip(("dq", "dk", "dv"), into, strict=True))
        _flash_attn_varlen_backward(**{**backward, "deterministic": False})
    options: dict[str, Any] = {"lengths_q": [6], "lengths_k": [9], "causal": True}
    assert_gives(torch.cat(out, dim=1), packed, q, k, v, **options)
    assert_gradients(grads, dout, packed, q, k, v, **options)


def test_flash_linear_attention(device: torch.device) -> None:
    """fla/layers/attn.py: both public functions in try/except, window (w - 1, 0) and causal."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        flash_attn_func = None
    assert flash_attn_func is not None

    window: dict[str, Any] = {"causal": True, "window_size": (2, 0)}
    q, k, v = (randn(device, 1, SEQLEN, heads, HEADDIM) for heads in (4, 2, 2))
    out = flash_attn_func(q, k, v, **window)
    assert_gives(out.reshape(1, SEQLEN, -1).view(q.shape), attention, q, k, v, **window)
    cu_seqlens = cumulative([3, 5], device)
    # max_seqlen may be that of the model, longer than any sequence
    out = flash_attn_varlen_func(
        q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens, max_seqlen_q=64, max_seqlen_k=64, **window,
    ).unsqueeze(0)  # fmt: skip
    assert_gives(out[0], packed, q[0], k[0], v[0], lengths_q=[3, 5], max_seqlen_k=64, **window)


def test_signatures_are_plain(flash_attn: ModuleType) -> None:
    """What the inspections above rest on: functions, none of them with *args or **kwargs."""
    for kind in ("", "_varlen"):
        for direction in ("forward", "backward"):
            function = getattr(flash_attn.flash_attn_interface, f"_flash_attn{kind}_{direction}")
            kinds = {x.kind for x in inspect.signature(function).parameters.values()}
            assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}

"""Clients that make images, videos, shapes and speech: diffusers, Wan, HunyuanVideo, Open-Sora,
TRELLIS, VAR, Pointcept, InternVideo2, F5-TTS."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from tests.helpers.client_references import (
    add_rms_norm,
    assert_gives,
    assert_gradients,
    assert_lse,
    attention,
    mlp,
    packed,
)
from tests.helpers.probes import cumulative, importable, mask, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

NHEADS, HEADDIM = 3, 16
SCALE = HEADDIM**-0.5


def diffusers_attention(device: torch.device, *, permuted: bool) -> None:
    """The forward and backward that diffusers' autograd functions call."""
    assert importlib.util.find_spec("flash_attn") is not None
    assert Version(importlib.metadata.version("flash_attn")) >= Version("2.6.3")
    from flash_attn.flash_attn_interface import (
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
    )

    q, k, v, dout = (randn(device, 2, 6, NHEADS, HEADDIM) for _ in "qkvd")
    # a dropout that drops nothing asks for the lse, which upstream leaves out otherwise
    shared = (1e-30, SCALE, False, -1, -1, 0.0, None)
    with torch.set_grad_enabled(True):
        out, lse, _, rng_state = _wrapped_flash_attn_forward(q, k, v, *shared, False)
    assert_gives(out, attention, q, k, v)
    assert_lse(lse, q, k, v)
    if permuted:
        lse = lse.permute(0, 2, 1)
        assert lse.shape == q.shape[:3]
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    _wrapped_flash_attn_backward(dout, q, k, v, out, lse, *grads, *shared, False, rng_state)
    assert_gradients(grads, dout, attention, q, k, v)


def test_diffusers(device: torch.device) -> None:
    """diffusers/models/attention_dispatch.py: by find_spec and metadata, then flash_attn_func,
    flash_attn_varlen_func, _wrapped_flash_attn_forward, _wrapped_flash_attn_backward."""
    assert not importable("flash_attn_interface")
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (randn(device, 2, 6, NHEADS, HEADDIM) for _ in "qkv")
    out = flash_attn_func(
        q=q, k=k, v=v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    )  # fmt: skip
    assert_gives(out, attention, q, k, v)
    # keys shortened by a mask; every query stays
    key = torch.cat((k[0, :4], k[1, :5]))
    value = torch.cat((v[0, :4], v[1, :5]))
    out = flash_attn_varlen_func(
        q=q.flatten(0, 1), k=key, v=value, cu_seqlens_q=cumulative([6, 6], device),
        cu_seqlens_k=cumulative([4, 5], device), max_seqlen_q=6, max_seqlen_k=5,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    )  # fmt: skip
    lengths = {"lengths_q": [6, 6], "lengths_k": [4, 5]}
    assert_gives(
        out.unflatten(0, (2, -1)).flatten(0, 1), packed, q.flatten(0, 1), key, value, **lengths
    )
    diffusers_attention(device, permuted=False)


def test_diffusers_context_parallel(device: torch.device) -> None:
    """diffusers/models/attention_dispatch.py: the lse is permuted before it is saved, so the
    backward gets (batch, seqlen, nheads), in memory still as the forward wrote it. Upstream reads
    the memory, whatever the shape."""
    diffusers_attention(device, permuted=True)


def test_wan(device: torch.device) -> None:
    """wan/modules/attention.py: flash_attn.flash_attn_varlen_func, unless FA3 imports."""
    versions = {3: importable("flash_attn_interface"), 2: importable("flash_attn")}
    assert versions == {3: False, 2: True}
    import flash_attn

    batch, queries, keys = 2, 6, 5
    q = randn(device, batch, queries, NHEADS, HEADDIM, dtype=torch.float32).bfloat16() * 0.5
    k, v = (randn(device, batch, keys, NHEADS, HEADDIM) for _ in "kv")
    k_lens = torch.tensor([5, 3], dtype=torch.int32)
    q_lens = torch.tensor([queries] * batch, dtype=torch.int32)
    key, value = (torch.cat([u[:n] for u, n in zip(x, k_lens, strict=True)]) for x in (k, v))
    starts = [
        torch.cat([x.new_zeros([1]), x]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
        for x in (q_lens, k_lens)
    ]
    x = flash_attn.flash_attn_varlen_func(
        q=q.flatten(0, 1), k=key, v=value, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
        max_seqlen_q=queries, max_seqlen_k=keys, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), deterministic=False,
    ).unflatten(0, (batch, queries))  # fmt: skip
    lengths = {"lengths_q": [queries] * batch, "lengths_k": k_lens.tolist()}
    assert_gives(x.flatten(0, 1), packed, q.flatten(0, 1), key, value, **lengths)


def test_hunyuan_video(device: torch.device, flash_attn: ModuleType) -> None:
    """hyvideo/modules/attenion.py: _flash_attn_forward by the version as a string; padding as
    sequences of their own."""
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_func

    # image and the text that is there, then the text that is padding, for each sample
    batch, seqlen, lengths = 2, 7, [5, 2, 7, 0]
    q, k, v = (randn(device, batch, seqlen, NHEADS, HEADDIM) for _ in "qkv")
    flat = [x.reshape(batch * seqlen, NHEADS, HEADDIM) for x in (q, k, v)]
    cu_seqlens = cumulative(lengths, device)
    x = flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, seqlen, seqlen)
    x = x.view(batch, seqlen, x.shape[-2], x.shape[-1])
    assert_gives(x.flatten(0, 1), packed, *flat, lengths_q=lengths)
    assert x.reshape(batch, seqlen, -1).is_contiguous()

    assert flash_attn.__version__ >= "2.7.0"
    out, *_ = _flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=SCALE, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    assert_gives(out, attention, q, k, v)


def test_open_sora(device: torch.device) -> None:
    """opensora/models/mmdit/math.py: flash_attn_func of FA3 if it imports, of FA2 else."""
    try:
        from flash_attn_interface import flash_attn_func

        which = 3
    except ImportError:
        from flash_attn import flash_attn_func

        which = 2
    assert which == 2
    # (batch, nheads, seqlen, headdim), transposed for the call
    q, k, v = (randn(device, 2, NHEADS, 6, HEADDIM).transpose(1, 2) for _ in "qkv")
    assert_gives(flash_attn_func(q, k, v), attention, q, k, v)


def test_trellis(device: torch.device) -> None:
    """trellis/modules/{attention,sparse/attention}/full_attn.py: six functions, nothing but
    tensors and lengths."""
    import flash_attn

    qkv = randn(device, 2, 6, 3, NHEADS, HEADDIM)
    q, k, v = qkv.unbind(dim=2)
    kv = qkv[:, :, 1:]
    for out in (
        flash_attn.flash_attn_qkvpacked_func(qkv),
        flash_attn.flash_attn_kvpacked_func(q, kv),
        flash_attn.flash_attn_func(q, k, v),
    ):
        assert_gives(out.reshape(2, 6, -1).view(q.shape), attention, q, k, v)

    lengths = [7, 5]
    start = torch.cat([torch.tensor([0]), torch.cumsum(torch.tensor(lengths), dim=0)])
    cu, longest = start.int().to(device), max(lengths)
    qkv, q, k, v, kv = (x.flatten(0, 1) for x in (qkv, q, k, v, kv))
    for out in (
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, longest),
        flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest),
        flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest),
    ):
        assert_gives(out, packed, q, k, v, lengths_q=lengths)


def test_var(device: torch.device) -> None:
    """models/basic_var.py: dropout_add_layer_norm, fused_mlp_func and flash_attn_func, each only
    if it imports."""
    fused_mlp_func: Any = None
    dropout_add_layer_norm: Any = None
    try:
        from flash_attn.ops.fused_dense import fused_mlp_func
        from flash_attn.ops.layer_norm import dropout_add_layer_norm
    except ImportError:
        pass
    from flash_attn import flash_attn_func

    qkv = randn(device, 2, 6, 3, NHEADS, HEADDIM, dtype=torch.float16)
    q, k, v = qkv.unbind(dim=2)
    out = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=0.25 * SCALE)
    assert_gives(out.view(2, 6, -1).view(q.shape), attention, q, k, v, softmax_scale=0.25 * SCALE)

    assert None not in (fused_mlp_func, dropout_add_layer_norm)
    shapes = ((2, 6, 8), (16, 8), (8, 16), (16,), (8,))
    x, w1, w2, b1, b2 = (randn(device, *s).requires_grad_() for s in shapes)
    for training in (True, False):
        out = fused_mlp_func(
            x=x, weight1=w1, weight2=w2, bias1=b1, bias2=b2, activation="gelu_approx",
            save_pre_act=training, return_residual=False, checkpoint_lvl=0, heuristic=0,
            process_group=None,
        )  # fmt: skip
        assert_gives(out, mlp, x, w1, w2, b1, b2)
        if training:
            dout = randn(device, *out.shape)
            grads = torch.autograd.grad(out, (x, w1, w2, b1, b2), dout)
            assert_gradients(grads, dout, mlp, x, w1, w2, b1, b2)


def test_pointcept(device: torch.device) -> None:
    """pointcept/models/point_transformer_v3: flash_attn.flash_attn_varlen_qkvpacked_func on what
    was reordered and made half, back to the dtype of the model."""
    try:
        import flash_attn
    except ImportError:
        flash_attn = None
    assert flash_attn is not None

    lengths, order = [4, 4, 3], torch.randperm(11).to(device)
    qkv = randn(device, 11, 3 * NHEADS * HEADDIM, dtype=torch.float32).requires_grad_()
    half = qkv[order].half().reshape(-1, 3, NHEADS, HEADDIM)
    feat = flash_attn.flash_attn_varlen_qkvpacked_func(
        half, cumulative(lengths, device), max_seqlen=4, dropout_p=0.0, softmax_scale=0.3
    )
    assert feat.reshape(-1, NHEADS * HEADDIM).to(qkv.dtype).dtype == torch.float32
    q, k, v = half.unbind(1)
    options: dict[str, Any] = {"lengths_q": lengths, "softmax_scale": 0.3}
    assert_gives(feat, packed, q, k, v, **options)
    dout = randn(device, *feat.shape, dtype=torch.float16)
    (gradient,) = torch.autograd.grad(feat, half, dout)
    assert_gradients(gradient.unbind(1), dout, packed, q, k, v, **options)


def test_internvideo2(device: torch.device) -> None:
    """internvideo2/models/backbones/internvideo2: DropoutAddRMSNorm and FusedMLP in try/except,
    flash_attn_varlen_qkvpacked_func between unpad_input and pad_input."""
    try:
        from flash_attn.ops.rms_norm import DropoutAddRMSNorm
    except ImportError:
        DropoutAddRMSNorm = None  # noqa: N806
    try:
        from flash_attn.modules.mlp import FusedMLP
    except ImportError:
        FusedMLP = None  # noqa: N806
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

    lengths, kept = [6, 4], mask([6, 4], 6, device)
    x = randn(device, 2, 6, 3 * NHEADS * HEADDIM)
    rows, indices, cu_seqlens, longest, _ = unpad_input(x, kept)
    qkv = rows.view(-1, 3, NHEADS, HEADDIM)
    out = flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, longest, 0.0, softmax_scale=None, causal=False
    )
    assert_gives(out, packed, *qkv.unbind(1), lengths_q=lengths)
    padded = pad_input(out.flatten(1), indices, 2, 6)
    assert torch.equal(padded[kept], out.flatten(1))
    assert not padded[~kept].any()

    assert None not in (DropoutAddRMSNorm, FusedMLP)
    norm = DropoutAddRMSNorm(24, eps=1e-6, prenorm=True).to(device, torch.bfloat16)
    hidden, residual = (randn(device, 2, 6, 24) for _ in range(2))
    norm.weight.data += randn(device, 24) / 4
    assert_gives(norm(hidden, residual), add_rms_norm, hidden, residual, norm.weight, None, 1e-6)

    block = FusedMLP(in_features=24, hidden_features=32, heuristic=1).to(device, torch.bfloat16)
    weights = (block.fc1.weight, block.fc2.weight, block.fc1.bias, block.fc2.bias)
    assert_gives(block(hidden), mlp, hidden, *weights)


def test_f5_tts(device: torch.device) -> None:
    """f5_tts/model/modules.py: a find_spec, then flash_attn_varlen_func and bert_padding."""
    assert importlib.util.find_spec("flash_attn") is not None
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.bert_padding import pad_input, unpad_input

    lengths, kept = [4, 6], mask([4, 6], 6, device)
    q, k, v = (randn(device, 2, NHEADS, 6, HEADDIM).transpose(1, 2) for _ in "qkv")
    assert_gives(flash_attn_func(q, k, v, dropout_p=0.0, causal=False), attention, q, k, v)

    rows: list[Tensor] = []
    for tensor in (q, k, v):
        unpadded, indices, cu_seqlens, longest, _ = unpad_input(tensor, kept)
        rows.append(unpadded)
    x = flash_attn_varlen_func(*rows, cu_seqlens, cu_seqlens, longest, longest)
    assert_gives(x, packed, *rows, lengths_q=lengths)
    assert rows[0].equal(q[kept])
    x = pad_input(x, indices, 2, 6).reshape(2, -1, NHEADS * HEADDIM)
    assert x.shape == (2, 6, NHEADS * HEADDIM)
    assert not x[~kept].any()

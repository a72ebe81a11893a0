"""Clients that train models: nanotron, axolotl, llm-foundry, OLMo-core, Megatron-LM, InternEvo, and
transformers below many of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor

from tests.helpers.client_references import (
    add_rms_norm,
    assert_gives,
    assert_gradients,
    attention,
    cross_entropy,
    layer_norm,
    packed,
    rms_norm,
    rotated,
    tables,
)
from tests.helpers.probes import cumulative, importable, mask, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

HIDDEN = 24


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Over the labels that count."""
    return cross_entropy(logits, labels).sum() / (labels != -100).sum()


def losses_of(device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels, two of which are ignored."""
    logits = randn(device, 6, 11, dtype=torch.float32).requires_grad_()
    return logits, torch.tensor([1, -100, 3, 10, 0, -100], device=device)


def test_nanotron(device: torch.device, flash_attn: ModuleType) -> None:
    """nanotron/nn/{rotary,layer_norm,attention}.py and models: layers.rotary, layer_norm_fn, and
    flash_attn_varlen_kvpacked_func out of modules.mha, imported without try."""
    assert version.parse(flash_attn.__version__) >= version.parse("2.1.0")
    from flash_attn import bert_padding
    from flash_attn.flash_attn_interface import flash_attn_with_kvcache
    from flash_attn.layers.rotary import apply_rotary_emb
    from flash_attn.modules.mha import flash_attn_varlen_kvpacked_func
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    # (batch * seqlen, nheads, headdim), rotated where it lies
    tensor = randn(device, 12, 2, 16)
    before = tensor.view(-1, 6, 2, 16).clone()
    cos, sin = (x.bfloat16().to(device) for x in tables(6, 16))
    turned = apply_rotary_emb(tensor.view(-1, 6, 2, 16), cos, sin, interleaved=False, inplace=True)
    assert turned.data_ptr() == tensor.data_ptr()
    assert_gives(turned, rotated, before, cos, sin)

    x, residual = (randn(device, 2, 6, HIDDEN).requires_grad_() for _ in range(2))
    weight = randn(device, HIDDEN).requires_grad_()
    for rms, bias, norm in ((True, None, rms_norm), (False, randn(device, HIDDEN), layer_norm)):
        out = layer_norm_fn(
            x, weight, bias, residual=None, eps=1e-5, dropout_p=0.0, prenorm=False,
            residual_in_fp32=False, is_rms_norm=rms, return_dropout_mask=False,
        )  # fmt: skip
        assert_gives(out, norm, x, weight, bias, 1e-5)
    out = layer_norm_fn(
        x, weight, None, residual=residual, eps=1e-5, prenorm=True, is_rms_norm=True
    )
    assert_gives(out, add_rms_norm, x, residual, weight, None, 1e-5)
    douts = [randn(device, 2, 6, HIDDEN) for _ in range(2)]
    grads = torch.autograd.grad(out, (x, residual, weight), douts)
    assert_gradients(grads, douts, add_rms_norm, x, residual, weight, None, 1e-5)

    lengths, kept = [4, 6], mask([4, 6], 6, device)
    q, kv = randn(device, 2, 6, 4, 16), randn(device, 2, 6, 2, 2, 16)
    rows, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(q, kept)
    pairs = bert_padding.index_first_axis(kv.flatten(0, 1), indices)
    out = flash_attn_varlen_kvpacked_func(
        rows, pairs, cu_seqlens, cu_seqlens, longest, longest, dropout_p=0.0, softmax_scale=None,
        causal=True, return_attn_probs=False,
    )  # fmt: skip
    assert_gives(out, packed, rows, *pairs.unbind(1), lengths_q=lengths, causal=True)
    assert bert_padding.pad_input(out, indices, 2, 6).shape == q.shape

    out = flash_attn_with_kvcache(
        q[:, :1], *kv.unbind(2), rotary_cos=None, rotary_sin=None,
        cache_seqlens=torch.tensor([6, 6], dtype=torch.int32, device=device), causal=True,
        rotary_interleaved=False,
    )  # fmt: skip
    assert_gives(out, attention, q[:, :1], *kv.unbind(2), causal=True)


def test_axolotl(device: torch.device) -> None:
    """axolotl/monkeypatch/llama_attn_hijack_flash.py: the loss of transformers replaced by
    cross_entropy_loss; CrossEntropyLoss with inplace_backward."""
    assert importlib.util.find_spec("flash_attn") is not None
    from flash_attn.flash_attn_interface import flash_attn_func
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    source, target = losses_of(device)
    loss, _ = cross_entropy_loss(source, target, ignore_index=-100)
    assert_gives(loss, cross_entropy, source, target)
    loss = loss.sum() / (target != -100).sum()
    assert_gives(loss, mean_loss, source, target)

    before = source.detach().clone()
    loss = partial(CrossEntropyLoss, inplace_backward=True)()(source * 1, target)
    (gradient,) = torch.autograd.grad(loss, source)
    assert_gives(loss, mean_loss, before, target)
    assert_gradients([gradient], torch.tensor(1.0), mean_loss, before, target)

    q, k, v = (randn(device, 2, 6, 2, 16) for _ in "qkv")
    assert_gives(flash_attn_func(q, k, v, causal=True), attention, q, k, v, causal=True)


def test_llm_foundry(device: torch.device, flash_attn: ModuleType) -> None:
    """llmfoundry/models/layers/attention.py: two submodules as attributes, keys and values of one
    head expanded to all, ALiBi and a sliding window; DAIL rotary; the fused loss."""
    try:
        from flash_attn import bert_padding, flash_attn_interface
    except ImportError:
        pytest.fail("llm-foundry asks to install flash-attn")
    assert version.parse("2") <= version.parse(flash_attn.__version__)
    assert version.parse(flash_attn.__version__) >= version.parse("v2.4.2")
    assert not hasattr(flash_attn_interface, "flash_attn_unpadded_func")

    lengths, kept = [6, 4], mask([6, 4], 6, device)
    query, key, value = (randn(device, 2, 6, heads * 16) for heads in (2, 1, 1))
    rows, indices, cu_seqlens, longest, *_ = bert_padding.unpad_input(query, kept)
    rows = rows.view(-1, 2, 16)
    keys, values = (
        bert_padding.unpad_input(x, kept)[0].view(-1, 1, 16).expand(-1, 2, 16) for x in (key, value)
    )
    assert keys.stride(1) == 0
    slopes = torch.tensor([0.5, 0.25], device=device)
    out = flash_attn_interface.flash_attn_varlen_func(
        q=rows, k=keys, v=values, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=0.0, softmax_scale=0.25,
        causal=True, return_attn_probs=False, window_size=(3, 3), alibi_slopes=slopes,
    )  # fmt: skip
    options: dict[str, Any] = {"softmax_scale": 0.25, "causal": True, "window_size": (3, 3)}
    assert_gives(out, packed, rows, keys, values, lengths_q=lengths, alibi_slopes=slopes, **options)
    assert bert_padding.pad_input(out.view(-1, 32), indices, 2, 6).shape == query.shape

    from flash_attn.layers.rotary import RotaryEmbedding as DAILRotaryEmbedding
    from flash_attn.losses.cross_entropy import CrossEntropyLoss as FusedCrossEntropyLoss

    rotary = DAILRotaryEmbedding(dim=16, base=500.0, interleaved=False, scale_base=None)
    rotary = rotary.to(device)
    q, kv = randn(device, 2, 6, 2, 16), randn(device, 2, 6, 2, 1, 16)
    before = [q.clone(), kv[:, :, 0].clone()]
    turned, pairs = rotary(q, kv, seqlen_offset=1, max_seqlen=7)
    cos, sin = (x.bfloat16() for x in tables(7, 16, base=500.0))
    for got, x in zip((turned, pairs[:, :, 0].contiguous()), before, strict=True):
        assert_gives(got, rotated, x, cos, sin, range(1, 7))

    logits, targets = losses_of(device)
    losses = FusedCrossEntropyLoss(ignore_index=-100, reduction="none")(logits, targets)
    assert_gives(losses, cross_entropy, logits, targets)


def test_olmo_core(device: torch.device) -> None:
    """olmo_core/nn/attention/flash_attn_api.py, nn/layer_norm.py, nn/rope.py: attributes of
    flash_attn, FA3 and FA4 if they import, a cache with padding at the left, rms_norm_fn."""
    assert not importable("flash_attn_interface")
    assert not importable("flash_attn_3")
    assert not importable("flash_attn.cute")
    import flash_attn
    from flash_attn.layers.rotary import apply_rotary_emb_qkv_
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    window: dict[str, Any] = {"causal": True, "window_size": (2, 0)}
    qkv = randn(device, 2, 4, 3, 2, 16)
    before = qkv.clone()
    cos, sin = (x.to(device) for x in tables(4, 16))
    qkv = apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=False)
    for i in range(2):
        assert_gives(qkv[:, :, i].contiguous(), rotated, before[:, :, i], cos, sin)
    q, k, v = qkv.unbind(2)
    for out in (
        flash_attn.flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, **window),
        flash_attn.flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, **window),
    ):
        assert_gives(out.view(2, 4, -1).view(q.shape), attention, q, k, v, **window)
    # documents across the rows of a batch
    lengths, rows = [3, 5], qkv.view(8, 3, 2, 16)
    cu_seqlens = cumulative(lengths, device)
    q, k, v = rows.unbind(1)
    for out in (
        flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, **window),
        flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, 5, **window),
    ):
        assert_gives(out, packed, q, k, v, lengths_q=lengths, **window)

    k_cache, v_cache = (randn(device, 2, 8, 2, 16) for _ in "kv")
    q, k, v = (randn(device, 2, 1, 2, 16) for _ in "qkv")
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k, v=v, causal=True, softmax_scale=None, window_size=(-1, -1),
        cache_seqlens=torch.tensor([6, 4], dtype=torch.int32, device=device),
        cache_leftpad=torch.tensor([2, 0], dtype=torch.int32, device=device), block_table=None,
    )  # fmt: skip
    for row, (start, end) in enumerate(((2, 7), (0, 5))):
        assert torch.equal(k_cache[row, end - 1], k[row, 0])
        seen = (x[row : row + 1, start:end] for x in (k_cache, v_cache))
        assert_gives(out[row : row + 1], attention, q[row : row + 1], *seen, causal=True)

    x, weight = randn(device, 2, 4, HIDDEN), randn(device, HIDDEN)
    assert_gives(rms_norm_fn(x, weight, None, eps=1e-6), rms_norm, x, weight, None, 1e-6)


def test_megatron(device: torch.device) -> None:
    """megatron/core: FA3 and FA4 first, a version that may come from the module or from metadata,
    apply_rotary_emb over (seqlen, batch), paged prefill and decode."""
    assert not importable("flashattn_hopper")
    assert not importable("flash_attn_3")
    import flash_attn as fa

    text = (
        fa.__version__ if hasattr(fa, "__version__") else importlib.metadata.version("flash-attn")
    )
    assert version.Version(str(text)) >= version.Version("2.7.3")
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    from flash_attn.layers.rotary import apply_rotary_emb

    t = randn(device, 6, 2, 2, 16)
    cos, sin = (x.bfloat16().to(device) for x in tables(6, 16))
    y = apply_rotary_emb(t.permute(1, 0, 2, 3), cos, sin, True)
    assert_gives(y, rotated, t.permute(1, 0, 2, 3), cos, sin, interleaved=True)

    # two requests of 3 and 6 tokens in pages of 4
    pages = [randn(device, 5, 4, 2, 16) for _ in "kv"]
    table = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32, device=device)
    lengths = [3, 6]
    keys, values = (
        torch.cat([x[row].flatten(0, 1)[:n] for row, n in zip(table, lengths, strict=True)])
        for x in pages
    )
    q, cu_seqlens = randn(device, 9, 4, 16), cumulative(lengths, device)
    out = flash_attn_varlen_func(
        q, *pages, cu_seqlens, cu_seqlens, 6, 6, softmax_scale=0.25, causal=True, block_table=table
    )
    options: dict[str, Any] = {"softmax_scale": 0.25, "causal": True}
    assert_gives(out, packed, q, keys, values, lengths_q=lengths, **options)
    last = q[[2, 8]][:, None]
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = flash_attn_with_kvcache(
        q=last, k_cache=pages[0], v_cache=pages[1], cache_seqlens=sizes, block_table=table,
        **options,
    )  # fmt: skip
    assert_gives(
        out[:, 0], packed, last[:, 0], keys, values, lengths_q=[1, 1], lengths_k=lengths, **options
    )


def test_internevo(device: torch.device) -> None:
    """internlm/model: extensions one by one in try/except, attention modules, an autograd class by
    position, the loss."""
    for extension in ("rotary_emb", "dropout_layer_norm", "fused_dense_lib", "xentropy_cuda_lib"):
        assert not importable(extension)
    with pytest.raises(ImportError):
        from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func  # noqa: F401
    from flash_attn.flash_attn_interface import FlashAttnVarlenKVPackedFunc
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.modules.mha import FlashCrossAttention, FlashSelfAttention

    lengths = [5, 3]
    qkv = randn(device, 8, 3, 2, 16).requires_grad_()
    cu_seqlens, (q, k, v) = cumulative(lengths, device), qkv.unbind(1)
    attend = FlashSelfAttention(causal=True, softmax_scale=None, attention_dropout=0.0)
    out = attend(qkv, cu_seqlens=cu_seqlens, max_seqlen=5)
    assert_gives(out, packed, q, k, v, lengths_q=lengths, causal=True)
    cross = FlashCrossAttention(causal=False, attention_dropout=0.0)
    out = cross(
        q, qkv[:, 1:], cu_seqlens=cu_seqlens, max_seqlen=5, cu_seqlens_k=cu_seqlens, max_seqlen_k=5
    )
    assert_gives(out, packed, q, k, v, lengths_q=lengths)
    out = FlashAttnVarlenKVPackedFunc.apply(
        q, qkv[:, 1:], cu_seqlens, cu_seqlens, 5, 5, 0.0, None, True, (-1, -1), 0.0, None, False,
        False, True,
    )  # fmt: skip
    assert_gives(out, packed, q, k, v, lengths_q=lengths, causal=True)
    dout = randn(device, *out.shape)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    assert_gradients(gradient.unbind(1), dout, packed, q, k, v, lengths_q=lengths, causal=True)
    padded = qkv.view(2, 4, 3, 2, 16)
    assert_gives(attend(padded), attention, *padded.unbind(2), causal=True)

    logits, labels = losses_of(device)
    loss = CrossEntropyLoss(reduction="mean", inplace_backward=False, process_group=None)
    assert_gives(loss(logits, labels), mean_loss, logits, labels)


def test_transformers(device: torch.device, flash_attn: ModuleType) -> None:
    """transformers/utils/import_utils.py and modeling_flash_attention_utils.py: which distribution
    provides flash_attn, at what version, with which arguments; windows of (w - 1, w - 1)."""
    spec = importlib.util.find_spec("flash_attn")
    assert spec is not None
    assert spec.submodule_search_locations
    assert flash_attn.__path__
    distributions = importlib.metadata.packages_distributions()["flash_attn"]
    assert "flash-attn" in [name.replace("_", "-") for name in distributions]
    found = version.parse(importlib.metadata.version("flash_attn"))
    assert found >= version.parse("2.3.3")
    assert found >= version.parse("2.4.1")

    parameters = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    assert {"window_size", "deterministic", "softcap", "dropout_p"} <= set(parameters)
    assert "s_aux" not in parameters

    # positions that begin anew tell packed sequences apart; their longest stays a tensor
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device).flatten()
    starts = (positions == 0).nonzero().flatten()
    cu_seqlens = torch.cat((starts, starts.new_tensor([8]))).int()
    longest = cu_seqlens.diff().max()
    q, k, v = (randn(device, 8, heads, 16) for heads in (4, 2, 2))
    options: dict[str, Any] = {"causal": True, "window_size": (2, 2), "softcap": 20.0}
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, softmax_scale=0.3, deterministic=False, **options,
    )  # fmt: skip
    expected = {"lengths_q": [3, 5], "softmax_scale": 0.3, **options}
    assert_gives(out.view(1, 8, 4, 16)[0], packed, q, k, v, **expected)

"""Models that bring their code along: Qwen-1, InternVL (InternViT, InternLM2, Phi-3), DeepSeek-VL2
and MPT; and names that no client may find."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging import version

from tests.helpers.client_references import (
    assert_gives,
    attention,
    packed,
    rms_norm,
    rotated,
    tables,
)
from tests.helpers.probes import cumulative, importable, mask, randn

pytestmark = pytest.mark.usefixtures("flash_attn")


def test_qwen1(device: torch.device) -> None:
    """modeling_qwen.py: three imports, each with its own way out; the version cut into numbers."""
    flash_attn_unpadded_func: Any = None
    dense: Any = None
    try:
        from flash_attn.layers.rotary import apply_rotary_emb_func
    except ImportError:
        apply_rotary_emb_func = None
    try:
        from flash_attn.ops.rms_norm import rms_norm as rms_norm_func
    except ImportError:
        rms_norm_func = None
    try:
        import flash_attn

        assert hasattr(flash_attn, "__version__")
        major, minor = (int(part) for part in flash_attn.__version__.split(".")[:2])
        if major >= 2:
            if minor >= 1:
                from flash_attn.flash_attn_interface import flash_attn_func as dense
            from flash_attn.flash_attn_interface import (
                flash_attn_varlen_func as flash_attn_unpadded_func,
            )
        else:
            from flash_attn.flash_attn_interface import flash_attn_unpadded_func
    except ImportError:
        pass
    assert None not in (apply_rotary_emb_func, rms_norm_func, flash_attn_unpadded_func, dense)

    t = randn(device, 2, 5, 2, 16)
    cos, sin = (x.to(device) for x in tables(5, 16))
    turned = apply_rotary_emb_func(t.float(), cos, sin)
    assert turned.dtype == torch.float32
    assert_gives(turned, rotated, t.float(), cos, sin)

    x, weight = randn(device, 2, 5, 32), randn(device, 32)
    assert_gives(rms_norm_func(x, weight, 1e-6), rms_norm, x, weight, None, 1e-6)

    q, k, v = (randn(device, 2, 5, 2, 16) for _ in "qkv")
    out = dense(q, k, v, 0.0, softmax_scale=None, causal=True)
    assert_gives(out, attention, q, k, v, causal=True)
    # one more token against all keys: not causal, and lengths counted by arange
    rows = [x.flatten(0, 1) for x in (q[:, -1:], k, v)]
    ends = [torch.arange(0, 2 * n + 1, n, dtype=torch.int32, device=device) for n in (1, 5)]
    out = flash_attn_unpadded_func(*rows, *ends, 1, 5, 0.0, softmax_scale=None, causal=False)
    assert_gives(out, packed, *rows, lengths_q=[1, 1], lengths_k=[5, 5])


def test_internvl(device: torch.device) -> None:
    """internvl_chat/internvl/model and patch: the function of flash-attn 1 first; packed training
    with cu_seqlens in the place of the mask; InternLM2's imports."""
    try:
        from flash_attn.flash_attn_interface import flash_attn_unpadded_qkvpacked_func

        pytest.fail("flash-attn 1 would be taken for granted")
    except ImportError:
        from flash_attn.flash_attn_interface import (
            flash_attn_varlen_qkvpacked_func as flash_attn_unpadded_qkvpacked_func,
        )
    from flash_attn import flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input

    qkv = randn(device, 2, 4, 3, 2, 16)
    rows = qkv.flatten(0, 1)
    cu_seqlens = torch.arange(0, 9, step=4, dtype=torch.int32, device=device)
    out = flash_attn_unpadded_qkvpacked_func(
        rows, cu_seqlens, 4, 0.0, softmax_scale=None, causal=False
    )
    assert_gives(out, packed, *rows.unbind(1), lengths_q=[4, 4])
    assert out.view(2, 4, -1).is_contiguous()

    attention_mask = cumulative([3, 5], device)[None]
    with torch.no_grad():
        cu_seqlens = attention_mask.squeeze(0)
        longest = max(cu_seqlens[i + 1] - cu_seqlens[i] for i in range(2)).item()
    q, k, v = (x[None].squeeze(0) for x in rows.unbind(1))
    out = flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, softmax_scale=None, causal=True,
    )  # fmt: skip
    assert_gives(out, packed, q, k, v, lengths_q=[3, 5], causal=True)

    kept = mask([3, 4], 4, device)
    indices = torch.nonzero(kept.int().flatten(), as_tuple=False).flatten()
    chosen = index_first_axis(qkv.reshape(8, 3 * 2, 16), indices)
    assert torch.equal(chosen, qkv.flatten(2, 3)[kept])
    whole = pad_input(chosen, indices, 2, 4)
    assert torch.equal(whole[kept], chosen)


def test_phi3(device: torch.device) -> None:
    """internvl/model/phi3/modeling_phi3.py: window_size by the signature of flash_attn_func."""
    supports_window = False
    try:
        from flash_attn import flash_attn_func

        supports_window = "window_size" in list(inspect.signature(flash_attn_func).parameters)
    except ImportError:
        pytest.fail("Phi-3 warns that flash-attention is not installed")
    assert supports_window
    q, k, v = (randn(device, 2, 6, heads, 16) for heads in (4, 2, 2))
    options: dict[str, Any] = {"causal": True, "window_size": (2, 2)}
    assert_gives(
        flash_attn_func(q, k, v, 0.0, softmax_scale=None, **options), attention, q, k, v, **options
    )


def test_deepseek_vl2(device: torch.device) -> None:
    """deepseek_vl2/models: flash_attn_qkvpacked_func for images; latent attention, whose values
    are narrower and come padded, for text."""
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

    assert callable(index_first_axis)
    qkv = randn(device, 2, 6, 3, 2, 16)
    out = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, causal=False, deterministic=False)
    assert_gives(out, attention, *qkv.unbind(2))

    lengths, kept = [4, 6], mask([4, 6], 6, device)
    q, k, v = (randn(device, 2, 6, 2, size) for size in (24, 24, 16))
    v = torch.nn.functional.pad(v, [0, 8])
    rows = []
    for tensor in (q, k, v):
        unpadded, indices, cu_seqlens, longest, *_ = unpad_input(tensor, kept)
        rows.append(unpadded)
    out = flash_attn_varlen_func(
        *rows, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, softmax_scale=0.2, causal=True,
    )  # fmt: skip
    assert_gives(out, packed, *rows, lengths_q=lengths, softmax_scale=0.2, causal=True)
    narrow = pad_input(out, indices, 2, 6)[:, :, :, :16]
    assert torch.equal(narrow[kept], out[:, :, :16])


def test_mpt(device: torch.device, flash_attn: ModuleType) -> None:
    """attention.py of MPT: checks by version, unpad_input_for_concatenated_sequences, alibi."""
    checks = ("2.0.0", "2.1.1", "2.4.2")
    assert all(version.parse(flash_attn.__version__) >= version.parse(x) for x in checks)
    from flash_attn import bert_padding, flash_attn_interface

    # two samples of 6 tokens: 2 and 3 of a document each, and 5
    in_length = torch.tensor([[2, 3, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0]], device=device)
    q, k, v = (randn(device, 2, 6, 2, 16) for _ in "qkv")
    rows = []
    for tensor in (q, k, v):
        unpadded, indices, cu_seqlens, longest = (
            bert_padding.unpad_input_for_concatenated_sequences(tensor, in_length)
        )
        rows.append(unpadded)
    slopes = torch.tensor([0.5, 0.125], device=device)
    out = flash_attn_interface.flash_attn_varlen_func(
        *rows, cu_seqlens, cu_seqlens, longest, longest, causal=True, alibi_slopes=slopes
    )
    assert_gives(out, packed, *rows, lengths_q=[2, 3, 5], causal=True, alibi_slopes=slopes)
    assert bert_padding.pad_input(out, indices, 2, 6).shape == q.shape


ABSENT = [
    # FA3 and FA4, preferred by who finds them, with another interface
    *("flash_attn_interface", "flash_attn_3", "flashattn_hopper", "flash_attn.cute"),
    # extensions, for which there are ways out
    *("dropout_layer_norm", "rotary_emb", "fused_dense_lib", "xentropy_cuda_lib"),
    # flash-attn 1
    *("flash_attn.flash_attention", "flash_attn.flash_blocksparse_attention"),
]


@pytest.mark.parametrize("name", ABSENT)
def test_absent(name: str) -> None:
    """What would raise when it is called must not import either."""
    assert not importable(name)


@pytest.mark.parametrize("kind", ["", "qkvpacked_", "kvpacked_"])
def test_names_of_flash_attn_1_are_absent(flash_attn: ModuleType, kind: str) -> None:
    """InternVL and InternEvo would believe them to be those of flash-attn 1."""
    name = f"flash_attn_unpadded_{kind}func"
    assert not hasattr(flash_attn, name)
    assert not hasattr(flash_attn.flash_attn_interface, name)

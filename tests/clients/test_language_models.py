"""Clients that define language and sequence models: ModernBERT, contrastors, safari, mamba, mdlm,
ESM, scGPT, evo2 (vortex)."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.client_references import (
    add_layer_norm,
    add_rms_norm,
    assert_gives,
    assert_gradients,
    attention,
    cross_entropy,
    layer_norm,
    packed,
    rms_norm,
    rotated,
    swiglu,
    tables,
)
from tests.helpers.probes import cumulative, importable, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

HIDDEN = 24


def scaled(size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights of a norm, around one."""
    return (1 + torch.randn(size) / 4).to(dtype).to(device).requires_grad_()


def test_modernbert(device: torch.device) -> None:
    """src/bert_layers/{attention,rotary,normalization,loss}.py of ModernBERT: FA3 first, versions
    compared as strings, packed rotary in place, sliding windows, Triton norms and loss."""
    assert not importable("flash_attn_interface")
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
    from flash_attn.layers.rotary import RotaryEmbedding
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
    from flash_attn.ops.triton.rotary import apply_rotary

    assert not importlib.metadata.version("flash_attn") < "2.5.7"
    assert RotaryEmbedding is not None

    lengths, positions = [5, 3], [0, 1, 2, 3, 4, 0, 1, 2]
    cu_seqlens = cumulative(lengths, device)
    cos, sin = (x.to(device) for x in tables(5, 16))
    qkv = randn(device, 8, 3, 2, 16)
    q, k, v = (x.clone() for x in qkv.unbind(1))
    # q and k as twice the heads, one rotation for both
    apply_rotary(
        qkv[:, :2].view(8, -1, 16), cos, sin, seqlen_offsets=0, cu_seqlens=cu_seqlens,
        max_seqlen=5, interleaved=False, inplace=True, conjugate=False,
    )  # fmt: skip
    for got, before in zip(qkv[:, :2].unbind(1), (q, k), strict=True):
        assert_gives(got.contiguous(), rotated, before, cos, sin, positions)
    assert torch.equal(qkv[:, 2], v)

    local: dict[str, Any] = {"window_size": (2, 2)}
    out = flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens=cu_seqlens, max_seqlen=5, deterministic=True, dropout_p=0.0, **local
    )
    assert_gives(out.view(8, -1).view(8, 2, 16), packed, *qkv.unbind(1), lengths_q=lengths, **local)
    padded = qkv.view(2, 4, 3, 2, 16)
    out = flash_attn_qkvpacked_func(padded, dropout_p=0.0, deterministic=False, **local)
    assert_gives(out, attention, *padded.unbind(2), **local)

    x, weight, bias = randn(device, 8, HIDDEN), scaled(HIDDEN, device), randn(device, HIDDEN)
    out = layer_norm_fn(x, weight, bias, eps=1e-5, prenorm=False, is_rms_norm=False)
    assert_gives(out, layer_norm, x, weight, bias, 1e-5)
    norm = RMSNorm(HIDDEN, eps=1e-5).to(device, torch.bfloat16)
    assert_gives(norm(x), rms_norm, x, norm.weight, None, 1e-5)

    logits = randn(device, 8, 11, dtype=torch.float32)
    labels = torch.tensor([1, -100, 3, 10, 0, -100, 7, 2], device=device)
    loss, z_loss = CrossEntropyLoss(
        inplace_backward=False, ignore_index=-100, lse_square_scale=1e-2, return_z_loss=True
    )(logits, labels)

    def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        squares = logits.logsumexp(-1).square().masked_fill(labels == -100, 0.0) * 1e-2
        rows = cross_entropy(logits, labels) + squares
        return rows.sum() / 6, squares.sum() / 6

    assert_gives((loss, z_loss), losses, logits, labels)


def test_contrastors(device: torch.device) -> None:
    """src/contrastors/layers/{block,mlp,attention}.py: dropout, add and norm at once, by the class
    of a norm; rowscale and layerscale; swiglu; FusedDense."""
    from flash_attn.ops.activations import swiglu as fused_swiglu
    from flash_attn.ops.fused_dense import FusedDense
    from flash_attn.ops.layer_norm import (
        dropout_add_layer_norm,
        dropout_add_layer_norm_parallel_residual,
    )
    from flash_attn.ops.rms_norm import (
        RMSNorm,
        dropout_add_rms_norm,
        dropout_add_rms_norm_parallel_residual,
    )

    x, y, residual = (randn(device, 2, 4, HIDDEN).requires_grad_() for _ in range(3))
    rows = torch.tensor([[0.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 2.0]]).bfloat16().to(device)
    columns = scaled(HIDDEN, device)
    douts = [randn(device, 2, 4, HIDDEN) for _ in range(3)]
    for norm_cls in (partial(nn.LayerNorm, eps=1e-5), partial(RMSNorm, eps=1e-5)):
        norm = norm_cls(HIDDEN).to(device, torch.bfloat16)
        norm.weight.data += randn(device, HIDDEN) / 4
        single, parallel, plain = (
            (dropout_add_rms_norm, dropout_add_rms_norm_parallel_residual, add_rms_norm)
            if isinstance(norm, RMSNorm)
            else (dropout_add_layer_norm, dropout_add_layer_norm_parallel_residual, add_layer_norm)
        )
        # an RMSNorm has a bias, and it is None
        affine = (norm.weight, norm.bias)
        common = {"prenorm": True, "residual_in_fp32": False}
        out = single(x, residual, *affine, 0.0, norm.eps, rowscale=None, layerscale=None, **common)
        assert_gives(out, plain, x, residual, *affine, norm.eps)
        given = [t for t in (x, residual, *affine) if t is not None]
        grads = torch.autograd.grad(out, given, douts[:2])
        assert_gradients(grads, douts[:2], plain, x, residual, *affine, norm.eps)

        def scaled_norm(x: Tensor, rows: Tensor, columns: Tensor, *rest: Any) -> Any:
            return plain(x * rows[..., None] * columns, *rest)  # noqa: B023

        out = single(
            x, residual, *affine, 0.0, norm.eps, rowscale=rows, layerscale=columns, **common
        )
        assert_gives(out, scaled_norm, x, rows, columns, residual, *affine, norm.eps)

        def both(x: Tensor, y: Tensor, residual: Tensor, *rest: Any) -> Any:
            normed, total = plain(x + y, residual, *rest)  # noqa: B023
            return normed, normed, total

        out = parallel(x, y, residual, *affine, *affine, 0.0, norm.eps, **common)
        assert_gives(out, both, x, y, residual, *affine, norm.eps)

    out = fused_swiglu(x, y)
    assert_gives(out, swiglu, x, y)
    assert_gradients(torch.autograd.grad(out, (x, y), douts[0]), douts[0], swiglu, x, y)
    dense = FusedDense(HIDDEN, 16, bias=True).to(device, torch.bfloat16)
    assert isinstance(dense, nn.Linear)
    assert_gives(dense(x), functional.linear, x, dense.weight, dense.bias)


@pytest.mark.parametrize("fused", [False, True])
def test_safari(device: torch.device, fused: bool) -> None:
    """src/models/sequence/long_conv_lm.py: a small GPT of GPT2Embeddings, Block, MHA and Mlp (or
    FusedMLP, with dropout_add_layer_norm), and GenerationMixin."""
    from flash_attn.modules.block import Block
    from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
    from flash_attn.modules.mha import MHA, ParallelMHA
    from flash_attn.modules.mlp import FusedMLP, Mlp, ParallelFusedMLP
    from flash_attn.ops.fused_dense import ColumnParallelLinear
    from flash_attn.ops.layer_norm import dropout_add_layer_norm
    from flash_attn.utils.generation import GenerationMixin

    for parallel in (ParallelGPT2Embeddings, ParallelMHA, ParallelFusedMLP, ColumnParallelLinear):
        assert isinstance(parallel, type)
    assert hasattr(GenerationMixin, "generate")

    factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    mixer = partial(MHA, num_heads=2, causal=True, layer_idx=0, use_flash_attn=True, **factory)
    gelu = partial(functional.gelu, approximate="tanh")
    inner = partial(Mlp, hidden_features=32, activation=gelu, **factory)
    if fused:
        inner = partial(FusedMLP, hidden_features=32, **factory)
    embeddings = GPT2Embeddings(HIDDEN, 11, 8, **factory)
    block = Block(
        HIDDEN, mixer, inner, norm_cls=partial(nn.LayerNorm, eps=1e-5, **factory), prenorm=True,
        resid_dropout1=0.0, resid_dropout2=0.0, fused_dropout_add_ln=fused,
        residual_in_fp32=False, sequence_parallel=False, mark_shared_params=False,
    )  # fmt: skip
    ids = torch.randint(11, (2, 6)).to(device)
    hidden, residual = block(embeddings(ids, position_ids=None), None, mixer_kwargs={})
    if fused:
        weight, bias = scaled(HIDDEN, device), randn(device, HIDDEN)
        final = dropout_add_layer_norm(
            hidden, residual, weight, bias, 0.0, 1e-5, prenorm=False, residual_in_fp32=False
        )
        total = hidden + residual
        assert_gives(final, layer_norm, total, weight, bias, 1e-5)

    names, values = zip(
        *[*embeddings.state_dict().items(), *block.state_dict().items()], strict=True
    )

    def gpt(ids: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        w = SimpleNamespace(**{n.replace(".", "_"): x for n, x in zip(names, values, strict=True)})
        x = w.word_embeddings_weight[ids] + w.position_embeddings_weight[: ids.shape[1]]
        normed = layer_norm(x, w.norm1_weight, w.norm1_bias, 1e-5)
        qkv = functional.linear(normed, w.mixer_Wqkv_weight, w.mixer_Wqkv_bias)
        context = attention(*qkv.unflatten(-1, (3, 2, -1)).unbind(2), causal=True).flatten(2)
        x = x + functional.linear(context, w.mixer_out_proj_weight, w.mixer_out_proj_bias)
        normed = layer_norm(x, w.norm2_weight, w.norm2_bias, 1e-5)
        wide = gelu(functional.linear(normed, w.mlp_fc1_weight, w.mlp_fc1_bias))
        return functional.linear(wide, w.mlp_fc2_weight, w.mlp_fc2_bias), x

    assert_gives((hidden, residual), gpt, ids, *values)


@pytest.mark.parametrize("flash", [False, True])
def test_safari_generation(device: torch.device, flash: bool) -> None:
    """src/models/sequence/long_conv_lm.py: InferenceParams, which MHA fills token by token."""
    from flash_attn.modules.mha import MHA
    from flash_attn.utils.generation import InferenceParams

    mha = MHA(32, 2, causal=True, layer_idx=0, rotary_emb_dim=16, use_flash_attn=flash)
    mha = mha.to(device, torch.bfloat16).eval()
    x, params = randn(device, 2, 6, 32), InferenceParams(max_seqlen=8, max_batch_size=2)
    steps = []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            steps.append(mha(x[:, start:end], inference_params=params))
            params.seqlen_offset += end - start

    def whole(x: Tensor, wqkv: Tensor, bqkv: Tensor, wo: Tensor, bo: Tensor) -> Tensor:
        q, k, v = functional.linear(x, wqkv, bqkv).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = (rotated(t, *tables(6, 16)) for t in (q, k))
        return functional.linear(attention(q, k, v, causal=True).flatten(2), wo, bo)

    assert_gives(torch.cat(steps, 1), whole, x, *mha.Wqkv.parameters(), *mha.out_proj.parameters())


def test_safari_distributed(process_group: dist.ProcessGroup) -> None:
    """src/models/sequence/long_conv_lm.py: sync_shared_params and all_gather_raw."""
    from flash_attn.utils.distributed import all_gather_raw, sync_shared_params

    layer = nn.LayerNorm(4)
    layer.weight._shared_params = True  # type: ignore[attr-defined]
    sync_shared_params(layer, process_group)
    assert bool((layer.weight == 1).all())
    x = torch.rand(3, 4)
    gathered, _ = all_gather_raw(x, process_group)
    assert torch.equal(gathered, x)


def test_mamba(device: torch.device) -> None:
    """mamba_ssm/modules/mha.py: RotaryEmbedding and its tables, flash_attn_with_kvcache over
    slices of a packed cache that it must write into."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        flash_attn_with_kvcache = None
    try:
        from flash_attn.layers.rotary import RotaryEmbedding
    except ImportError:
        RotaryEmbedding = None  # noqa: N806
    assert None not in (flash_attn_with_kvcache, RotaryEmbedding)

    rotary = RotaryEmbedding(16, base=10000.0, interleaved=False, device=device)
    cos, sin = (x.bfloat16() for x in tables(8, 16))
    # the prompt
    q, kv = randn(device, 2, 4, 4, 16), randn(device, 2, 4, 2, 2, 16)
    k = kv[:, :, 0].clone()
    turned_q, turned_kv = rotary(q.clone(), kv.clone(), seqlen_offset=0, max_seqlen=8)
    assert_gives(turned_q, rotated, q, cos, sin)
    assert_gives(turned_kv[:, :, 0].contiguous(), rotated, k, cos, sin)
    assert torch.equal(turned_kv[:, :, 1], kv[:, :, 1])

    # one more token
    rotary._update_cos_sin_cache(8, device=device, dtype=q.dtype)
    cache = torch.full((3, 8, 2, 2, 16), torch.nan, device=device, dtype=torch.bfloat16)
    cache[:2, :4] = turned_kv
    q, kv = randn(device, 2, 1, 4, 16), randn(device, 2, 1, 2, 2, 16)
    batch = cache[:2]
    out = flash_attn_with_kvcache(
        q, batch[:, :, 0], batch[:, :, 1], kv[:, :, 0], kv[:, :, 1],
        rotary_cos=rotary._cos_cached, rotary_sin=rotary._sin_cached,
        cache_seqlens=torch.full((2,), 4, dtype=torch.int32, device=device),
        softmax_scale=None, causal=True, rotary_interleaved=rotary.interleaved,
    )  # fmt: skip
    new = [x.contiguous() for x in cache[:2, 4:5].unbind(2)]
    assert_gives(new[0], rotated, kv[:, :, 0], cos, sin, [4])
    assert torch.equal(new[1], kv[:, :, 1])
    assert bool(cache[:2, 5:].isnan().all())

    def decode(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        k = torch.cat((past[:, :, 0], rotated(k, cos, sin, [4])), 1)
        v = torch.cat((past[:, :, 1], v), 1)
        return attention(rotated(q, cos, sin, [4]), k, v, causal=True)

    assert_gives(out, decode, q, kv[:, :, 0], kv[:, :, 1], turned_kv)


def test_mdlm(device: torch.device) -> None:
    """models/dit.py of mdlm: `import flash_attn.layers.rotary`, then attributes of flash_attn."""
    import flash_attn
    import flash_attn.layers.rotary

    cos, sin = (x.bfloat16().to(device) for x in tables(6, 16))
    qkv = randn(device, 2, 6, 3, 2, 16)
    q, k, v = (x.clone() for x in qkv.unbind(2))
    turned = flash_attn.layers.rotary.apply_rotary_emb_qkv_(qkv, cos, sin)
    assert turned.data_ptr() == qkv.data_ptr()
    for got, before in zip(turned[:, :, :2].unbind(2), (q, k), strict=True):
        assert_gives(got.contiguous(), rotated, before, cos, sin)
    assert torch.equal(turned[:, :, 2], v)

    rows = turned.flatten(0, 1)
    cu_seqlens = torch.arange(0, 3 * 6, step=6, dtype=torch.int32, device=device)
    out = flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func(
        rows, cu_seqlens, 6, 0.0, causal=False
    )
    assert_gives(out, packed, *rows.unbind(1), lengths_q=[6, 6])


def test_esm(device: torch.device) -> None:
    """esm/layers/rotary.py: apply_rotary into q and k of a packed qkv."""
    try:
        from flash_attn.ops.triton.rotary import apply_rotary
    except ImportError:
        apply_rotary = None
    assert apply_rotary is not None

    cos, sin = (x.bfloat16().to(device) for x in tables(5, 16))
    qkv = randn(device, 8, 3, 2, 16)
    before, cu_seqlens = qkv.clone(), cumulative([5, 3], device)
    for i in range(2):
        apply_rotary(qkv[:, i], cos, sin, cu_seqlens=cu_seqlens, max_seqlen=5, inplace=True)
        expected = (before[:, i], cos, sin, [0, 1, 2, 3, 4, 0, 1, 2])
        assert_gives(qkv[:, i].contiguous(), rotated, *expected)
    assert torch.equal(qkv[:, 2], before[:, 2])


def test_scgpt() -> None:
    """scgpt/model/model.py: flash_attn.flash_attention is of flash-attn 1, so it falls back."""
    try:
        from flash_attn.flash_attention import FlashMHA

        flash_attn_available = True
    except ImportError:
        flash_attn_available = False
    assert not flash_attn_available
    with pytest.raises(NameError):
        FlashMHA  # noqa: B018


def test_vortex(device: torch.device) -> None:
    """vortex/model (evo2): ops.rms_norm. Its flash_attn_2_cuda, the extension, has no stand-in."""
    from flash_attn.ops.rms_norm import rms_norm as rms_norm_func

    x, weight = randn(device, 2, 4, HIDDEN).requires_grad_(), scaled(HIDDEN, device)
    out, dout = rms_norm_func(x, weight, 1e-6), randn(device, 2, 4, HIDDEN)
    assert_gives(out, rms_norm, x, weight, None, 1e-6)
    grads = torch.autograd.grad(out, (x, weight), dout)
    assert_gradients(grads, dout, rms_norm, x, weight, None, 1e-6)


def test_vortex_operators(flash_attn: ModuleType) -> None:
    """vortex/ops/attn_interface.py: operators of its own in the namespace flash_attn, one of them
    with the name of an operator that upstream has."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    try:
        for name in ("_flash_attn_forward", "_vortex_attn_forward"):
            library.define(f"{name}(Tensor q) -> Tensor")
            library.impl(name, torch.neg, "CPU")
        q = randn(torch.device("cpu"), 1, 4, 2, 16)
        assert torch.equal(torch.ops.flash_attn._vortex_attn_forward(q), -q)
        assert torch.equal(torch.ops.flash_attn._flash_attn_forward(q), -q)
        assert_gives(flash_attn.flash_attn_func(q, q, q), attention, q, q, q)
    finally:
        library._destroy()

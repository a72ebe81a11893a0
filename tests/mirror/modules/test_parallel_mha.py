"""`ParallelMHA` in two processes is `MHA` with the ranks' weights put together."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.modules.mha import MHA, ParallelMHA
from flash_attn_npu.utils.distributed import allreduce_sequence_parallel_grad
from flash_attn_npu.utils.generation import InferenceParams
from tests.helpers import world

SIZE, HEADS, BATCH, SEQLEN = 32, 8, 2, 6


def _rows(rank, heads, heads_kv, headdim):
    """Which rows of the whole Wqkv a rank of two holds: its heads of q, of k and of v."""
    rows = torch.arange((heads + 2 * heads_kv) * headdim).split(
        [heads * headdim, heads_kv * headdim, heads_kv * headdim]
    )
    return torch.cat([part[_half(rank, len(part) // headdim, headdim)] for part in rows])


def _half(rank, heads, headdim):
    """The first rank has one head more of an odd number."""
    middle = (heads + 1) // 2 * headdim
    return slice(middle) if rank == 0 else slice(middle, None)


def _share(rank, module, heads, heads_kv, headdim):
    rows = _rows(rank, heads, heads_kv, headdim)
    columns = _half(rank, heads, headdim)
    state = {
        "Wqkv.weight": module["Wqkv.weight"][rows],
        "Wqkv.bias": module["Wqkv.bias"][rows],
        "out_proj.weight": module["out_proj.weight"][:, columns],
    }
    # the sum over the ranks contains the bias once
    return {**state, "out_proj.bias": module["out_proj.bias"]} if rank == 0 else state


def _run(rank, group, options, size, heads, state, x, cotangent, scattered, flat):
    module = ParallelMHA(
        size, heads, group, sequence_parallel=scattered, dtype=torch.float64, **options
    )
    heads_kv = options.get("num_heads_kv", heads)
    module.load_state_dict(_share(rank, state, heads, heads_kv, size // heads))
    seqlen = x.shape[1] if flat else None
    if flat:
        x, cotangent = x.flatten(0, 1), cotangent.flatten(0, 1)
    if scattered:
        x, cotangent = x.chunk(2)[rank], cotangent.chunk(2)[rank]
    x = x.clone().requires_grad_()
    out = module(x, seqlen=seqlen)
    out.backward(cotangent)
    if scattered:
        allreduce_sequence_parallel_grad(module, group)
    slopes = getattr(module.inner_attn, "alibi_slopes", None)
    return out.detach(), x.grad, {n: p.grad for n, p in module.named_parameters()}, slopes


CASES = [
    {"causal": True},
    {"use_flash_attn": True, "causal": True, "num_heads_kv": 2, "rotary_emb_dim": 4},
    {"use_flash_attn": True, "use_alibi": True, "window_size": (3, 1), "checkpointing": True},
]


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "sequence parallel"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_two_ranks_are_one_module(options, scattered, flat):
    _compare(options, SIZE, HEADS, scattered, flat)


def test_heads_that_do_not_come_out_even():
    options = {"use_flash_attn": True, "use_alibi": True, "causal": True}
    slopes = _compare(options, 24, 3, True, True)
    whole = MHA(24, 3, **options).inner_attn.alibi_slopes
    assert torch.equal(slopes[0], whole[:2])
    assert torch.equal(slopes[1], whole[2:])


def _compare(options, size, heads, scattered, flat):
    torch.manual_seed(0)
    module = MHA(size, heads, dtype=torch.float64, **options)
    x = torch.randn(BATCH, SEQLEN, size, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(BATCH, SEQLEN, size, dtype=torch.float64)
    expected = module(x)
    expected.backward(cotangent)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    ranks = world.run(_run, options, size, heads, state, x.detach(), cotangent, scattered, flat)
    heads_kv = options.get("num_heads_kv", heads)
    whole = {n: p.grad for n, p in module.named_parameters()}
    for rank, (out, grad, gradients, _) in enumerate(ranks):
        mine = [expected.detach(), x.grad]
        if flat:
            mine = [tensor.flatten(0, 1) for tensor in mine]
        if scattered:
            mine = [tensor.chunk(2)[rank] for tensor in mine]
        for got, reference in zip((out, grad), mine, strict=True):
            torch.testing.assert_close(got, reference)
        shares = _share(rank, whole, heads, heads_kv, size // heads)
        assert shares.keys() == gradients.keys()
        for name, share in shares.items():
            torch.testing.assert_close(gradients[name], share)
    return [rank[3] for rank in ranks]


def _steps(rank, group, state, x, flat):
    options = {"causal": True, "layer_idx": 1, "num_heads_kv": 4, "rotary_emb_dim": 4}
    module = ParallelMHA(
        SIZE,
        HEADS,
        group,
        use_flash_attn=True,
        sequence_parallel=False,
        dtype=torch.float64,
        **options,
    )
    module.load_state_dict(_share(rank, state, HEADS, 4, SIZE // HEADS))
    cache = module.allocate_inference_cache(BATCH, 8)
    assert cache.shape == (BATCH, 8, 2, 2, 4)
    params = InferenceParams(8, BATCH, key_value_memory_dict={1: cache})
    outs = []
    with torch.no_grad():
        for part in x.split([3, 1, 2], 1):
            if flat:
                out = module(part.flatten(0, 1), part.shape[1], params).unflatten(0, (BATCH, -1))
            else:
                out = module(part, inference_params=params)
            outs.append(out)
            params.seqlen_offset += part.shape[1]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
def test_steps_over_a_cache(flat):
    torch.manual_seed(0)
    module = MHA(SIZE, HEADS, num_heads_kv=4, causal=True, rotary_emb_dim=4, dtype=torch.float64)
    x = torch.randn(BATCH, SEQLEN, SIZE, dtype=torch.float64)
    for got in world.run(_steps, module.state_dict(), x, flat):
        torch.testing.assert_close(got, module(x).detach())


def _refusals(rank, group):
    for heads, heads_kv in ((8, 1), (12, 3), (1, 1)):
        with pytest.raises(ArgumentError, match=r"^num_heads, num_heads_kv: got .*; allowed: "):
            ParallelMHA(48, heads, group, num_heads_kv=heads_kv)
    module = ParallelMHA(SIZE, HEADS, group, sequence_parallel=False)
    with pytest.raises(ArgumentError, match=r"^seqlen: got 4 for x of shape \(6, 32\)"):
        module(torch.ones(6, SIZE), seqlen=4)
    for x, seqlen in ((torch.ones(SIZE, SIZE), None), (torch.ones(1, 4, SIZE), 4)):
        with pytest.raises(ArgumentError, match=r"^seqlen: got .*; allowed: .*; to fix it: "):
            module(x, seqlen=seqlen)
    return sorted(module.state_dict())


def test_refusals_and_names():
    names = ["Wqkv.bias", "Wqkv.weight", "out_proj.weight"]
    first, second = world.run(_refusals)
    assert first == sorted([*names, "out_proj.bias"])
    assert second == names


def test_one_process_without_a_group():
    torch.manual_seed(0)
    for argument, call in (
        ("num_heads", lambda: ParallelMHA(SIZE, 5, None)),
        ("use_alibi", lambda: ParallelMHA(SIZE, HEADS, None, use_alibi=True)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
    alone, module = ParallelMHA(SIZE, HEADS, None, causal=True), MHA(SIZE, HEADS, causal=True)
    alone.load_state_dict(module.state_dict())
    x = torch.randn(BATCH, SEQLEN, SIZE)
    torch.testing.assert_close(alone(x), module(x))
    torch.testing.assert_close(alone(x.flatten(0, 1), SEQLEN), module(x).flatten(0, 1))

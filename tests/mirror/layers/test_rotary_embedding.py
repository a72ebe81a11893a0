"""RotaryEmbedding: its tables, how they grow, xPos, and what it does to qkv or q and kv."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.layers.rotary import RotaryEmbedding
from tests.helpers.rotation_reference import assert_rounded_once, batch_positions, rotated

DIM = 6
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_tables(
    rows: int, base: float = 10000.0, scale_base: float | None = None, for_k: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin in float64; xPos multiplies by zeta ** ((n - rows // 2) / scale_base)."""
    n = torch.arange(rows, dtype=torch.float64)[:, None]
    i = torch.arange(DIM // 2, dtype=torch.float64)[None]
    angle = n * base ** (-2 * i / DIM)
    growth = torch.ones(())
    if scale_base is not None:
        zeta = (2 * i / DIM + 0.4) / 1.4
        growth = zeta ** ((n - rows // 2) / scale_base)
    if for_k:
        growth = 1 / growth
    return angle.cos() * growth, angle.sin() * growth


def close(got: Tensor | None, exact: Tensor, dtype: torch.dtype) -> None:
    assert got is not None
    assert got.dtype == dtype
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), exact, rtol=eps, atol=max(eps, 3e-5))


@each_dtype
@pytest.mark.parametrize("scale_base", [None, 8.0])
@pytest.mark.parametrize("base", [10000.0, 100])
def test_tables(
    device: torch.device, dtype: torch.dtype, scale_base: float | None, base: float
) -> None:
    module = RotaryEmbedding(DIM, base=base, scale_base=scale_base, device=device)
    module._update_cos_sin_cache(50, device, dtype)
    for table, exact in zip(
        (module._cos_cached, module._sin_cached), exact_tables(50, base, scale_base), strict=True
    ):
        close(table, exact, dtype)
    of_k = (module._cos_k_cached, module._sin_k_cached)
    if scale_base is None:
        assert of_k == (None, None)
    else:
        for table, exact in zip(of_k, exact_tables(50, base, scale_base, True), strict=True):
            close(table, exact, dtype)


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 8.0])
@pytest.mark.parametrize("offset", [0, 2, [1, 0]], ids=str)
@pytest.mark.parametrize("form", ["qkv", "grouped", "q and kv"])
def test_rotates_in_place(
    device: torch.device,
    dtype: torch.dtype,
    interleaved: bool,
    scale_base: float | None,
    offset: int | list[int],
    form: str,
) -> None:
    module = RotaryEmbedding(DIM, interleaved=interleaved, scale_base=scale_base, device=device)
    q = torch.randn(2, 4, 2, 8).to(device, dtype)
    kv = torch.randn(2, 4, 2, 2, 8).to(device, dtype)
    before = [part.cpu().double().flatten(0, 1).clone() for part in (q, *kv.unbind(2))]
    offsets = offset if isinstance(offset, int) else torch.tensor(offset, device=device)
    max_seqlen = None if isinstance(offset, int) else 7
    if form == "qkv":
        packed = torch.cat((q[:, :, None], kv), dim=2)
        assert module(packed, seqlen_offset=offsets, max_seqlen=max_seqlen) is packed
        after = packed.unbind(2)
    elif form == "grouped":
        packed = torch.cat((q, *kv.unbind(2)), dim=2)
        options = {"seqlen_offset": offsets, "max_seqlen": max_seqlen, "num_heads_q": 2}
        assert module(packed, **options) is packed
        after = packed.split(2, dim=2)
    else:
        answer = module(q, kv, offsets, max_seqlen)
        assert answer[0] is q
        assert answer[1] is kv
        after = (q, *kv.unbind(2))
    positions = batch_positions(2, 4, offset)
    of_q = (module._cos_cached, module._sin_cached)
    of_k = of_q if scale_base is None else (module._cos_k_cached, module._sin_k_cached)
    for got, original, pair in zip(after[:2], before[:2], (of_q, of_k), strict=True):
        exact = rotated(original, *pair, positions, interleaved)
        assert_rounded_once(got.flatten(0, 1), exact, 8.0)
    assert torch.equal(after[2].cpu().double().flatten(0, 1), before[2])


def test_scores_depend_on_distances_only(device: torch.device) -> None:
    """What rotary embedding and xPos are for; xPos leaves a decay with the distance."""
    for scale_base in (None, 8.0):
        module = RotaryEmbedding(8, scale_base=scale_base, device=device)
        q, k = (torch.randn(1, 1, 1, 8).to(device) for _ in range(2))
        qkv = torch.stack((q, k, k), dim=2).expand(1, 12, 3, 1, 8).clone()
        module(qkv)
        scores = (qkv[0, :, 0, 0] @ qkv[0, :, 1, 0].T).cpu()
        for distance in range(-3, 4):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_state_dict_is_empty_and_names_are_upstreams() -> None:
    module = RotaryEmbedding(DIM, scale_base=512)
    assert module.state_dict() == {}
    assert set(dict(module.named_buffers())) == {"inv_freq", "scale"}
    plain = RotaryEmbedding(DIM, 500)
    assert plain.scale is None
    assert (plain.dim, plain.base, plain.interleaved, plain.scale_base) == (DIM, 500.0, False, None)
    assert plain._seq_len_cached == 0


def test_tables_are_made_again_only_when_they_must_be(device: torch.device) -> None:
    module = RotaryEmbedding(DIM, device=device)
    qkv = torch.randn(1, 5, 3, 1, 8).to(device)
    module(qkv)
    first = module._cos_cached
    module(qkv[:, :3])
    assert module._cos_cached is first
    assert module._seq_len_cached == 5
    module(qkv, seqlen_offset=2)
    assert module._cos_cached.shape == (7, 3)
    module(qkv, max_seqlen=20)
    assert module._cos_cached.shape == (20, 3)
    module(qkv.to(torch.bfloat16))
    assert module._cos_cached.dtype == torch.bfloat16


def test_a_module_in_half_precision_keeps_exact_tables(device: torch.device) -> None:
    for scale_base in (None, 8.0):
        module = RotaryEmbedding(DIM, scale_base=scale_base).to(device, torch.bfloat16)
        module._update_cos_sin_cache(50, device, torch.float32)
        close(module._cos_cached, exact_tables(50, scale_base=scale_base)[0], torch.float32)


def test_changed_frequencies_are_used() -> None:
    module = RotaryEmbedding(DIM)
    module.inv_freq.fill_(0.0)
    qkv = torch.randn(1, 5, 3, 1, 8)
    assert torch.equal(module(qkv.clone()), qkv)


def test_training_after_inference(device: torch.device) -> None:
    module = RotaryEmbedding(DIM, device=device)
    with torch.inference_mode():
        module(torch.randn(1, 5, 3, 1, 8).to(device))
    qkv = torch.randn(1, 5, 3, 1, 8).to(device).requires_grad_()
    module(qkv * 1).sum().backward()
    assert qkv.grad is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    module = RotaryEmbedding(DIM)
    compiled = torch.compile(lambda x: module(x * 1), fullgraph=True, backend="aot_eager")
    mine = torch.randn(1, 5, 3, 1, 8, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    compiled(mine).square().sum().backward()
    RotaryEmbedding(DIM)(theirs * 1).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch._dynamo.reset()


def test_bad_input_is_named_and_has_no_effect() -> None:
    module = RotaryEmbedding(DIM)
    q, offsets = torch.ones(1, 4, 2, 8), torch.tensor([1])
    for argument, call in (
        ("max_seqlen", lambda: module(q, torch.ones(1, 4, 2, 2, 8), offsets)),
        ("kv", lambda: module(q, torch.ones(1, 4, 3, 2, 8))),
        ("qkv", lambda: module(q)),
        ("max_seqlen", lambda: module(torch.ones(1, 4, 3, 2, 8), max_seqlen=2**31)),
        ("seqlen_offset", lambda: module(torch.ones(1, 4, 3, 2, 8), seqlen_offset=2**31)),
        ("dim", lambda: RotaryEmbedding(-8)),
    ):
        with pytest.raises(ArgumentError, match=f"^{argument}: got "):
            call()
    with pytest.raises(ArgumentTypeError, match=r"^qkv: got "):
        module(None)
    with pytest.raises(ArgumentTypeError, match=r"^dim: got "):
        RotaryEmbedding("8")
    assert bool((q == 1).all())


@pytest.mark.parametrize(
    ("argument", "shape", "options"),
    [
        ("cos", (2, 4, 2, 2, 4), {}),
        ("seqlen_offset", (2, 8, 2, 2, 8), {"max_seqlen": 4}),
        (
            "seqlen_offset",
            (3, 4, 2, 2, 8),
            {"seqlen_offset": torch.tensor([0, 1]), "max_seqlen": 8},
        ),
        ("seqlen_offset", (2, 4, 2, 2, 8), {"seqlen_offset": -9}),
    ],
    ids=["narrow", "long", "batch", "negative"],
)
def test_queries_are_not_turned_when_keys_are_refused(
    argument: str, shape: tuple[int, ...], options: dict[str, int | Tensor]
) -> None:
    q = torch.ones(2, 4, 2, 8)
    with pytest.raises(ArgumentError, match=f"^{argument}: got "):
        RotaryEmbedding(DIM)(q, torch.ones(shape), **options)
    assert bool((q == 1).all())


def test_tables_that_could_not_be_made_are_made_at_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, qkv = RotaryEmbedding(DIM), torch.ones(1, 5, 3, 1, 8)
    module(qkv[:, :2].clone())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "outer", lambda *_: pytest.fail("out of memory"))
        with pytest.raises(pytest.fail.Exception):
            module(qkv.clone())
    assert module(qkv).shape == qkv.shape


def test_keys_may_be_longer_than_queries() -> None:
    module = RotaryEmbedding(DIM)
    _, kv = module(torch.randn(1, 2, 1, 8), torch.randn(1, 9, 2, 1, 8))
    assert kv.shape[1] == 9
    assert module._seq_len_cached == 9

"""The autograd classes of the interface, called by `.apply` as clients do."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flash_attn_npu import fallback
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.helpers.reference import varlen as exact_varlen

HEADS, HEADS_K, HEADDIM = 4, 2, 8
LENGTHS_Q, LENGTHS_K = (3, 0, 5), (4, 2, 5)


class Class(NamedTuple):
    """A class, the function it belongs to, and which tensors that takes."""

    name: str
    function: str
    tensors: str
    packed: bool

    @property
    def apply(self) -> Any:
        return getattr(interface, self.name).apply


CLASSES = (
    Class("FlashAttnFunc", "flash_attn_func", "q k v", False),
    Class("FlashAttnQKVPackedFunc", "flash_attn_qkvpacked_func", "qkv", False),
    Class("FlashAttnKVPackedFunc", "flash_attn_kvpacked_func", "q kv", False),
    Class("FlashAttnVarlenFunc", "flash_attn_varlen_func", "q k v", True),
    Class("FlashAttnVarlenQKVPackedFunc", "flash_attn_varlen_qkvpacked_func", "qkv", True),
    Class("FlashAttnVarlenKVPackedFunc", "flash_attn_varlen_kvpacked_func", "q kv", True),
)
every = pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.name)


def tensors(one: Class, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for name in one.tensors.split():
        seqlen = sum(LENGTHS_Q if "q" in name else LENGTHS_K) if one.packed else 6
        parts = (len(name),) if len(name) > 1 else ()
        heads = HEADS_K if name in ("k", "v", "kv") else HEADS
        shape = (seqlen, *parts, heads, HEADDIM)
        made.append(torch.randn(shape if one.packed else (2, *shape), dtype=dtype).to(device))
    return [x.requires_grad_() for x in made]


def lengths(one: Class, device: torch.device | str) -> tuple[Any, ...]:
    if not one.packed:
        return ()
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(some).cumsum(0)], dtype=torch.int32, device=device)
        for some in (LENGTHS_Q, LENGTHS_K)
    )
    return (cu_q, max(LENGTHS_Q)) if one.tensors == "qkv" else (cu_q, cu_k, 5, 5)


def options(**changed: Any) -> tuple[Any, ...]:
    """dropout_p to deterministic."""
    given: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
    }
    return tuple({**given, **changed}.values())


def last(one: Class, return_softmax: bool = False, is_grad_enabled: bool = True) -> tuple[Any, ...]:
    """return_softmax to is_grad_enabled."""
    paged = (None,) if one.name == "FlashAttnVarlenFunc" else ()
    return return_softmax, *paged, is_grad_enabled


def gradients(out: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return torch.autograd.grad((out * weight).sum(), given)


@every
@pytest.mark.parametrize(
    "changed",
    [
        {"causal": False},
        {"window_size": (2, 0), "softmax_scale": 0.3, "deterministic": True},
        {"softcap": 5.0, "alibi_slopes": torch.rand(HEADS), "causal": False},
        {"dropout_p": 0.3},
    ],
    ids=["plain", "window", "softcap, alibi", "dropout"],
)
def test_equals_the_public_function(
    one: Class, changed: dict[str, Any], device: torch.device
) -> None:
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in changed.items()}
    given = tensors(one, device, torch.float32)
    before = (*lengths(one, device), *options(**moved))
    answers = []
    for call, after in ((getattr(interface, one.function), (True,)), (one.apply, last(one, True))):
        torch.manual_seed(1)
        out, lse, s_dmask = call(*given, *before, *after)
        answers.append((out, lse, s_dmask, *gradients(out, given)))
        assert not lse.requires_grad
        assert not s_dmask.requires_grad
        assert out.is_contiguous()
    for theirs, ours in zip(*answers, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, device)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_the_class_of_internevo_is_right_about_numbers() -> None:
    one = CLASSES[-1]
    q, kv = tensors(one, "cpu", torch.float64)
    out = one.apply(q, kv, *lengths(one, "cpu"), *options(), *last(one))
    assert isinstance(out, Tensor)
    k, v = kv.unbind(1)
    cu_q, cu_k, _, longest_k = lengths(one, "cpu")
    expected = exact_varlen(q, k, v, cu_q, cu_k, max_seqlen_k=longest_k, causal=True)
    answers = [(x, *gradients(x, [q, kv])) for x in (out, expected.out)]
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)


# dynamo instantiates them, and warns of itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("one", CLASSES[-1:], ids=lambda one: one.name)
def test_in_one_graph(one: Class) -> None:
    given = tensors(one, "cpu", torch.float32)
    rest = (*lengths(one, "cpu"), *options(), *last(one))
    torch._dynamo.reset()
    apply = one.apply
    compiled = torch.compile(
        lambda *given: apply(*given, *rest), backend="aot_eager", fullgraph=True
    )
    expected = apply(*given, *rest)
    out = compiled(*given)
    for ours, theirs in zip(
        (out, *gradients(out, given)), (expected, *gradients(expected, given)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def test_without_grad_nothing_is_kept() -> None:
    one = CLASSES[0]
    given = tensors(one, "cpu", torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda _: None):
        out = one.apply(*given, *options(), *last(one, is_grad_enabled=False))
    assert not kept
    with pytest.raises(ArgumentError, match=r"^is_grad_enabled: got False, .*; allowed: .*; to "):
        out.sum().backward()


def test_pages_have_no_backward() -> None:
    one = CLASSES[3]
    q, *_ = tensors(one, "cpu", torch.float32)
    pages = [torch.randn(4, 16, HEADS_K, HEADDIM, requires_grad=True) for _ in range(2)]
    table = torch.tensor([[0], [1], [3]], dtype=torch.int32)
    rest = (*lengths(one, "cpu"), *options())
    out = one.apply(q, *pages, *rest, False, table, True)
    expected = interface.flash_attn_varlen_func(q, *pages, *rest, block_table=table)
    torch.testing.assert_close(out, expected)
    with pytest.raises(UnsupportedError, match=r"^block_table: got a backward; allowed: .*; to "):
        out.sum().backward()


def test_lengths_may_be_tensors(device: torch.device) -> None:
    one = CLASSES[-1]
    given = tensors(one, device, torch.float32)
    cu_q, cu_k, *longest = lengths(one, device)
    as_tensors = (torch.tensor(5, device=device), torch.tensor(5))
    first = one.apply(*given, cu_q, cu_k, *longest, *options(), *last(one))
    second = one.apply(*given, cu_q, cu_k, *as_tensors, *options(), *last(one))
    assert torch.equal(first.cpu(), second.cpu())


def test_the_policy_is_that_of_the_forward(npu: torch.device) -> None:
    one = CLASSES[0]
    given = tensors(one, npu, torch.float16)
    with fallback("allow"):
        out = one.apply(*given, *options(softcap=3.0), *last(one))
    with fallback("error"):
        assert all(grad.isfinite().all() for grad in gradients(out, given))
        with pytest.raises(UnsupportedError, match="softcap"):
            one.apply(*given, *options(softcap=3.0), *last(one))


def test_bad_input_is_named() -> None:
    q, k, v = tensors(CLASSES[0], "cpu", torch.float32)
    with pytest.raises(ArgumentTypeError, match=r"^q: got .*; allowed: a torch.Tensor; to fix it"):
        interface.FlashAttnFunc.apply([q], k, v, *options(), False, True)
    with pytest.raises(ArgumentTypeError, match=r"^window_size: got 3; allowed: "):
        interface.FlashAttnFunc.apply(q, k, v, *options(window_size=3), False, True)
    with pytest.raises(ArgumentError, match=r"^kv: got shape .*; allowed: .*; to fix it: "):
        interface.FlashAttnKVPackedFunc.apply(q, k, *options(), False, True)

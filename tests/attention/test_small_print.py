"""What one row, one condition or one argument decides, where the others would hide it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import fallback, flash_attn_interface, flash_attn_varlen_func, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table import attention as support
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func, npu_flash_attn_varlen_func
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn
from tests.helpers import reference
from tests.helpers.table_examples import cached, dense, packed


@pytest.fixture(autouse=True)
def nothing_remembered() -> Any:
    forget_all()
    yield
    forget_all()


@pytest.fixture
def offset_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_attn_npu._core.ground.settings._alibi_offset", True)


def served(run: Callable[[], Any]) -> str:
    """The one kernel that served a call."""
    with reporting() as report, torch.no_grad():
        run()
    (entry,) = report.tallies
    return entry.kernel


# the first dual of a process compiles torch's own formulas
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["q", "k", "v", "sink"])
def test_a_forward_mode_tangent_is_refused_by_name(device: torch.device, name: str) -> None:
    call = {x: torch.randn(1, 4, 2, 8, device=device) for x in "qkv"}
    call["sink"] = torch.zeros(2, device=device)
    with torch.autograd.forward_ad.dual_level():
        call[name] = torch.autograd.forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        with pytest.raises(UnsupportedError, match=rf"^{name}: got a tensor with a forward-mode"):
            npu_flash_attn_func(call["q"], call["k"], call["v"], s_aux=call["sink"])


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_a_gradient_of_one_tensor_over_pages(device: torch.device, wanted: str) -> None:
    torch.manual_seed(0)
    host = {"q": torch.randn(5, 2, 8), "k": torch.randn(3, 4, 2, 8), "v": torch.randn(3, 4, 2, 8)}
    call = {name: x.to(device).requires_grad_(name == wanted) for name, x in host.items()}
    pages = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32, device=device)
    out = flash_attn_varlen_func(
        *call.values(), [0, 2, 5], [0, 6, 10], 3, 6, causal=True, block_table=pages
    )
    dout = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, call[wanted], dout.to(device))
    exact = {name: x.double().requires_grad_() for name, x in host.items()}
    rows = [exact[name][[2, 0]].flatten(0, 1)[:6] for name in "kv"]
    others = [exact[name][1] for name in "kv"]
    k, v = (torch.cat(parts) for parts in zip(rows, others, strict=True))
    want = reference.varlen(exact["q"], k, v, [0, 2, 5], [0, 6, 10], max_seqlen_k=6, causal=True)
    (truth,) = torch.autograd.grad(want.out, exact[wanted], dout.double())
    torch.testing.assert_close(grad.cpu().double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_no_sequence_give_the_sink_nothing(
    device: torch.device, dtype: torch.dtype
) -> None:
    q = torch.randn(7, 2, 8, device=device, dtype=dtype)
    sink = torch.tensor([0.5, -1.0], device=device, requires_grad=True)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    grads = []
    for garbage in (0.0, float("nan"), float("inf")):
        out = npu_flash_attn_varlen_func(q, q, q, lengths, lengths, 3, 3, s_aux=sink)
        dout = torch.ones_like(out)
        dout[5:] = garbage
        grads.append(torch.autograd.grad(out, sink, dout)[0])
    assert grads[0].isfinite().all()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_deterministic_sink(npu: torch.device, needs_grad: bool) -> None:
    """Its backward is from the statistics, which count the sink."""
    q = torch.randn(1, 4, 2, 8, device=npu, dtype=torch.float16, requires_grad=needs_grad)
    with reporting() as report:
        npu_flash_attn_func(q, q, q, deterministic=True, s_aux=torch.zeros(2, device=npu))
    (entry,) = report.tallies
    assert entry.kernel == "npu_fusion_attention"


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "kernel"),
    [
        ([4, 6], [7, 9], "npu_fusion_attention"),
        ([0, 6], [3, 9], "blockwise"),
        ([3, 9], [0, 6], "blockwise"),
    ],
    ids=["none", "empty queries", "empty keys"],
)
def test_alibi_of_an_empty_side(
    npu: torch.device, offset_allowed: None, lengths_q: Any, lengths_k: Any, kernel: str
) -> None:
    assert served(lambda: packed(lengths_q, lengths_k, slopes=True)(npu)) == kernel


@pytest.mark.parametrize("lengths", [(71, 4), (4, 71), (70, 70)])
def test_the_longer_side_counts(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int]
) -> None:
    monkeypatch.setattr(support, "MAX_TOKENS", 70)
    kernel = "npu_fusion_attention" if max(lengths) == 70 else "blockwise"
    assert served(lambda: packed([lengths[0]], [lengths[1]])(npu)) == kernel
    assert served(lambda: dense(seqlens=lengths)(npu)) == kernel


LIMITS: dict[str, tuple[Callable[[int], Callable[[torch.device], Any]], int]] = {
    "group": (lambda n: cached(heads=n, heads_k=1), support.MAX_GROUP),
    "heads": (lambda n: dense(heads=(n, 1)), support.MAX_HEADS),
    "headdim": (lambda n: dense(headdim=n), support.MAX_HEADDIM),
    "page": (lambda n: cached(page=n), support.MAX_PAGE),
    "sequences": (lambda n: packed([1] * n), 3),
    "cached sequences": (lambda n: cached(batch=n), 3),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_itself_is_served(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(support, "MAX_SEQUENCES", 3)
    monkeypatch.setattr(support, "MAX_CACHED_SEQUENCES", 3)
    example, limit = LIMITS[name]
    kernels = [served(lambda n=n: example(n)(npu)) for n in (limit, limit + 1)]
    assert kernels[0].startswith("npu_fus")
    assert kernels[0] != kernels[1]


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([5, 6], [8, 9]), ([8, 9], [5, 6]), ([8, 9], [8, 9])]
)
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (2, 1)], ids=str)
def test_alibi_counts_from_the_bottom_right(
    npu: torch.device,
    offset_allowed: None,
    lengths_q: list[int],
    lengths_k: list[int],
    window: tuple[int, int],
) -> None:
    """Rows that see no key are left out of the launch; the others keep their place."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(n), 2, 16) for n in (lengths_q, lengths_k, lengths_k))
    slopes = torch.tensor([0.5, 0.25])
    cu_q, cu_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    options = {"window_size": window, "causal": window == (-1, 0)}
    longest = (max(lengths_q), max(lengths_k))
    with virtual_ascend.record() as seen:
        out = flash_attn_varlen_func(
            *(x.to(npu) for x in (q, k, v)), cu_q, cu_k, *longest, alibi_slopes=slopes.to(npu),
            **options,
        )  # fmt: skip
    assert [launch.name for launch in seen.launches if "attention" in launch.name] == [
        "npu_fusion_attention_v2"
    ]
    want = reference.varlen(
        *(x.double() for x in (q, k, v)), cu_q, cu_k, max_seqlen_k=longest[1],
        alibi_slopes=slopes.double(), **options,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), want.out, atol=1e-5, rtol=1e-5)


def test_deterministic_backwards_take_turns(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that they change is the process's: else one would end the other's early."""
    import torch_npu

    kernel, inside, seen = torch_npu.npu_fusion_attention_grad, [], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        time.sleep(0.05)
        seen.append((len(inside), torch.are_deterministic_algorithms_enabled()))
        inside.pop()
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_fusion_attention_grad", watched)
    q = torch.randn(1, 4, 2, 8, device=npu)
    lse = torch.zeros(1, 2, 4, device=npu)

    def backward() -> None:
        grads = [torch.empty_like(q) for _ in range(3)]
        flash_attn_interface._flash_attn_backward(
            *(q, q, q, q, q, lse, *grads, 0.0, 0.5, False, -1, -1, 0.0, None, True)
        )

    threads = [threading.Thread(target=backward) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, True)] * 3
    assert not torch.are_deterministic_algorithms_enabled()


GATES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], bool]] = {
    "halves": (lambda whole: whole.chunk(2, -1), True),
    "the halves swapped": (lambda whole: whole.chunk(2, -1)[::-1], False),
    "halves of a slice of rows": (lambda whole: whole[1:3].chunk(2, -1), True),
    "halves of a slice of columns": (lambda whole: whole[:, :64].chunk(2, -1), False),
    "every other column": (lambda whole: (whole[:, ::2], whole[:, 1::2]), False),
    "halves of a turned tensor": (lambda whole: whole.t().chunk(2, -1), False),
    "halves of every other row": (lambda whole: whole[::2].chunk(2, -1), False),
    "one half twice": (lambda whole: (whole.chunk(2, -1)[0],) * 2, False),
}


@pytest.mark.parametrize("name", GATES)
def test_halves_of_one_contiguous_tensor(npu: torch.device, name: str) -> None:
    """They are gated where they lie; what lies otherwise is copied together first."""
    parts, in_place = GATES[name]
    host = torch.randn(64, 128)
    x, y = parts(host.to(npu))
    with reporting() as report, virtual_ascend.record() as recorded:
        got = swiglu(x, y)
    (entry,) = report.tallies
    assert entry.kernel == "npu_swiglu"
    (launch,) = recorded.launches
    assert (launch.arguments["input"].data_ptr() == x.data_ptr()) == in_place
    x, y = parts(host.double())
    want = torch.nn.functional.silu(x) * y
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-5, rtol=1e-5)


EMPTY: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda x: layer_norm_fn(x, x.new_ones(8), None),
    "rotation": lambda x: apply_rotary_emb(x[None, :, None], x[:, :4], x[:, :4]),
    "gate": lambda x: swiglu(x, x),
    "loss": lambda x: cross_entropy_loss(x, x[:, 0].long()),
}


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_never_refused(name: str, rows: int) -> None:
    with fallback("error"):
        refused = pytest.raises(UnsupportedError, match="Ascend NPUs only")
        with refused if rows else nullcontext():
            EMPTY[name](torch.zeros(rows, 8))


def test_softmax_lse_is_of_the_dtype_that_is_written(device: torch.device) -> None:
    dense_call = flash_attn_interface.flash_attn_func
    cache_call = flash_attn_interface.flash_attn_with_kvcache
    q, lengths = torch.randn(1, 4, 2, 8, dtype=torch.float64, device=device), [0, 4]
    answers: dict[Callable[..., Any], Tensor] = {
        dense_call: dense_call(q, q, q, return_attn_probs=True)[1],
        flash_attn_varlen_func: flash_attn_varlen_func(
            q[0], q[0], q[0], lengths, lengths, 4, 4, return_attn_probs=True
        )[1],
        cache_call: cache_call(q, q, q, return_softmax_lse=True)[1],
    }
    for function, lse in answers.items():
        assert lse.dtype == torch.float64
        assert "float32 (float64 for float64)" in " ".join((function.__doc__ or "").split())

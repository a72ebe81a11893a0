"""Operators that write on an NPU and move no version counter: heard, or such as write no integers.

The list is that of the installed torch_npu: a new operator has to be put on one side or the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu._core.ground import unseen_writes
from flash_attn_npu._core.ground.lengths import host_lengths, recall_lengths, remember_lengths
from flash_attn_npu._core.ground.unseen_writes import OPERATORS
from flash_attn_npu._virtual_ascend.machine.arithmetic import overload

pytestmark = pytest.mark.usefixtures("npu")

ROUTES_THAT_COUNT = {
    *("abs", "addcmul", "neg", "pow", "zero"),
    *(
        "__ior__",
        "_cummax_helper",
        "_cummin_helper",
        "cumprod",
        "cumprod_",
        "cumsum",
        "gather",
        "sort",
    ),
    *("cat", "index_select", "kthvalue", "sum"),
}
"""torch_npu's kernels of these, or what calls them, go by operators that move the counter; the
dimension has a name where a gather, a sort or a sum is among them.
"""
OF_FRACTIONS = {
    *("acos", "addcdiv", "asin", "atan", "ceil", "cos", "cosh", "div", "erf", "erfc", "exp"),
    *("expm1", "floor", "frac", "lerp", "log", "log10", "log1p", "log2", "reciprocal", "round"),
    *("sigmoid", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
    *("_amp_foreach_non_finite_check_and_unscale_", "_fused_adam_", "_fused_adamw_", "_fused_sgd_"),
    *("_native_batch_norm_legit", "dropout_", "inverse", "linalg_cholesky", "log_sigmoid"),
    *("logsumexp", "mean", "multilabel_margin_loss", "nanmean", "nll_loss", "nll_loss2d"),
    *("rrelu_with_noise", "slow_conv3d"),
    *("_npu_silent_check", "_npu_silent_check_v2", "_npu_silent_check_v3", "npu_attn_softmax_"),
    *("npu_attn_softmax_backward_", "npu_add_rms_norm_v2", "npu_conv2d", "npu_conv3d"),
    *("npu_grouped_matmul_add_", "npu_hans_decode", "npu_sim_exponential_"),
}
OF_WEIGHTS_AND_CACHES = {
    *("_quantize_per_channel_impl", "_quantize_per_tensor_impl", "npu_add_quant_gmm_"),
    *("npu_add_quant_matmul_", "npu_batch_gather_matmul_", "npu_fused_causal_conv1d"),
    *("npu_fused_causal_conv1d_v2", "npu_gather_pa_kv_cache", "npu_kv_rmsnorm_rope_cache_v2"),
    *("npu_mla_prolog_v3", "npu_nsa_compress_infer", "npu_qkv_rms_norm_rope_cache"),
    *("npu_quant_scatter_", "npu_recurrent_gated_delta_rule", "npu_scatter_pa_cache"),
    *("npu_scatter_pa_kv_cache",),
}
OF_THE_CONTENTS_NOTHING = {"npu_format_cast_", "record_stream"}
UNHEARD = ROUTES_THAT_COUNT | OF_FRACTIONS | OF_WEIGHTS_AND_CACHES | OF_THE_CONTENTS_NOTHING

LENGTHS = (0, 2, 4, 9)


def written(*values: int) -> Tensor:
    return torch.tensor(values or LENGTHS, dtype=torch.int32).to("npu")


def unseen() -> Iterator[str]:
    """Operators of torch and torch_npu with a kernel of torch_npu, and none that moves counters."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        operator = overload(name) if name.startswith(("aten::", "npu::")) else None
        counts = torch._C._dispatch_has_kernel_for_dispatch_key(name, "ADInplaceOrView")
        if operator is not None and not counts and unseen_writes._written(operator):
            yield name.partition(".")[0]


def test_every_operator_is_heard_or_known_to_write_no_integers() -> None:
    names = {name.partition("::")[2] for name in unseen() if name not in OPERATORS}
    packets = {re.sub("^_foreach_(.*)_$", r"\1", name) for name in names}
    assert packets
    assert not packets - UNHEARD
    assert not {name.partition("::")[2] for name in OPERATORS} & UNHEARD


def advanced(x: Tensor) -> None:
    others = [written().clone() for _ in range(5)]
    tokens, sampled, positions, slots, tables = others
    torch.ops.npu.npu_advance_step_flashattn(
        tokens, sampled, positions, x, slots, tables[None], 4, 4, 16
    )


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: torch._foreach_add_([x], 0),
    "add, the second": lambda x: torch._foreach_add_([written(), x], [written(), written()]),
    "multiply": lambda x: torch._foreach_mul_([x], [1]),
    "copy": lambda x: torch._foreach_copy_([x], [written()]),
    "by name": lambda x: torch.ops.aten._foreach_sub_.Scalar(scalar=0, self=[x]),
    "at least": lambda x: torch._foreach_maximum_([x], [written()]),
    "at most": lambda x: torch._foreach_clamp_max_([x], [written()]),
    "a view": lambda x: torch._foreach_add_([x[1:]], 0),
    "advance": advanced,
    "scatter": lambda x: torch.ops.npu.scatter_update_(x, x[:1], x[:1], 0),
    "scatter by indices": lambda x: torch.ops.npu.npu_scatter_nd_update_(x, x[:1, None], x[:1]),
    "slice": lambda x: torch.ops.npu.npu_slice(written(), [0], [4], out=x),
    "ones": torch.ops.npu.one_,
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_was_read_is_forgotten_with_the_write(how: str, mode: Callable[[], Any]) -> None:
    x, other = written(), written()
    for tensor in (x, other):
        remember_lengths(tensor, LENGTHS)
    version = x._version
    with mode():
        try:
            WRITES[how](x)
        except NotImplementedError:
            # the card has no arithmetic of it, and might have written before
            assert how in ("advance", "scatter", "scatter by indices", "slice", "ones")
    assert x._version == version
    assert recall_lengths(x) is None
    assert recall_lengths(other) is not None


def test_a_write_to_a_larger_buffer_is_one_to_its_part() -> None:
    buffer = written(0, 2, 4, 9, 9)
    part = buffer[:4]
    assert host_lengths("cu_seqlens_q", part).cumulative == LENGTHS
    torch._foreach_copy_([buffer], [written(0, 1, 2, 9, 9)])
    assert host_lengths("cu_seqlens_q", part).cumulative == (0, 1, 2, 9)


def test_writes_of_fractions_and_on_the_host_forget_nothing() -> None:
    x = written()
    remember_lengths(x, LENGTHS)
    torch._foreach_add_([torch.zeros(3, device="npu"), torch.zeros(2, device="npu")], 1.0)
    torch._foreach_add_([torch.zeros(3, dtype=torch.int32)], 1)
    assert recall_lengths(x) is not None


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_a_heard_operator_is_what_it_was(device: str) -> None:
    """Values, gradients, counters, compiled code and transforms, as if nobody listened."""
    remember_lengths(written(), LENGTHS)
    leaf = torch.ones(3, device=device, requires_grad=True)

    def doubled(x: Tensor) -> Tensor:
        y = x * 1
        torch._foreach_mul_([y], 2.0)
        return y

    doubled(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2.0] * 3
    x = torch.ones(3, device=device)
    assert torch.func.functionalize(doubled)(x).tolist() == [2.0] * 3
    assert torch.func.grad(lambda x: doubled(x).sum())(x).tolist() == [2.0] * 3
    counted = torch.zeros(3, device=device)
    torch._foreach_add_([counted], 1.0)
    assert counted._version == (1 if device == "cpu" else 0)


def test_heard_operators_are_compiled(fresh_dynamo: None) -> None:
    remember_lengths(written(), LENGTHS)

    def counted(x: Tensor) -> Tensor:
        torch._foreach_add_([x], 1)
        return x * 2

    x = written()
    remember_lengths(x, LENGTHS)
    out = torch.compile(counted, backend="aot_eager", fullgraph=True)(x)
    assert out.tolist() == [2, 6, 10, 20]
    assert recall_lengths(x) is None

"""`torch.ops.flash_attn` names our operators while installed, and nothing is registered there."""

from __future__ import annotations

import torch

from flash_attn_npu import install
from flash_attn_npu._activation import operators


def test_the_name_is_ours_only_while_installed() -> None:
    with install():
        found = torch.ops.flash_attn._flash_attn_varlen_forward
        assert found is torch.ops.flash_attn_npu_shim._flash_attn_varlen_forward
    assert torch.ops.flash_attn is not torch.ops.flash_attn_npu_shim
    assert not hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward")


def test_nothing_is_registered_in_upstreams_namespace() -> None:
    with install():
        torch.ops.flash_attn._flash_attn_forward  # noqa: B018
        names = torch._C._dispatch_get_all_op_names()
    assert not [name for name in names if name.startswith("flash_attn::")]


def test_operators_that_somebody_registered_there_stay() -> None:
    library = torch.library.Library("flash_attn", "FRAGMENT")
    try:
        library.define("theirs(Tensor x) -> Tensor")
        operators.insert()
        assert hasattr(torch.ops.flash_attn, "theirs")
    finally:
        operators.remove()
        library._destroy()


def test_an_operator_registered_while_installed_is_found() -> None:
    library = torch.library.Library("flash_attn", "FRAGMENT")
    try:
        with install():
            assert not hasattr(torch.ops.flash_attn, "theirs")
            library.define("theirs(Tensor x) -> Tensor")
            library.impl("theirs", torch.neg, "CPU")
            assert torch.ops.flash_attn.theirs(torch.ones(1)).item() == -1
            assert hasattr(torch.ops.flash_attn, "_flash_attn_forward")
    finally:
        library._destroy()


def test_the_name_can_be_compiled() -> None:
    q = torch.randn(1, 4, 2, 8)

    def run(q: torch.Tensor) -> torch.Tensor:
        arguments = (q, q, q, 0.0, 0.5, True, -1, -1, 0.0, None, False)
        return torch.ops.flash_attn._flash_attn_forward(*arguments)[0]

    with install():
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q), run(q))
        torch._dynamo.reset()

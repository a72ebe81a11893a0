"""PyTorch's own functions beside the helper operators give the host's numbers on the card, forward
and backward, and launch no operator of torch_npu's namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from flash_attn_npu import _virtual_ascend as virtual_ascend

pytestmark = pytest.mark.usefixtures("npu")

Function = Callable[..., torch.Tensor]
Tensors = Sequence[torch.Tensor]

LABELS = torch.tensor([3, 0, -100, 1])
ROWS = torch.tensor([0, 2])


def labelled(loss: Function, **given: object) -> Function:
    return lambda x: loss(x, LABELS.to(x.device), **given)


MATRIX, WIDTH = (4, 6), (6,)

FUNCTIONS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, WIDTH, w, b), (MATRIX, WIDTH, WIDTH)),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, WIDTH, w), (MATRIX, WIDTH)),
    "layer_norm of two axes": (lambda x: F.layer_norm(x, MATRIX), ((2, *MATRIX),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, WIDTH, w, 1e-5), (MATRIX, WIDTH)),
    "rms_norm without weight": (lambda x: F.rms_norm(x, WIDTH), (MATRIX,)),
    "silu": (F.silu, (MATRIX,)),
    "gelu": (F.gelu, (MATRIX,)),
    "gelu of tanh": (lambda x: F.gelu(x, approximate="tanh"), (MATRIX,)),
    "relu": (lambda x: F.relu(x).square(), (MATRIX,)),
    "glu": (F.glu, (MATRIX,)),
    "cross_entropy": (labelled(F.cross_entropy), (MATRIX,)),
    "cross_entropy of rows": (labelled(F.cross_entropy, reduction="none"), (MATRIX,)),
    "cross_entropy smoothed": (labelled(F.cross_entropy, label_smoothing=0.1), (MATRIX,)),
    "log_softmax": (lambda x: x.log_softmax(-1), (MATRIX,)),
    "logsumexp": (lambda x: x.logsumexp(-1), (MATRIX,)),
    "nll_loss": (labelled(lambda x, y: F.nll_loss(x.log_softmax(-1), y)), (MATRIX,)),
    "embedding": (lambda w: F.embedding(ROWS.to(w.device), w, padding_idx=0), (MATRIX,)),
    "cumsum": (lambda x: x.cumsum(1), (MATRIX,)),
    "index_copy": (lambda x, y: x.index_copy(0, ROWS.to(x.device), y), (MATRIX, (2, 6))),
    "index_add": (lambda x, y: x.index_add(0, ROWS.to(x.device), y), (MATRIX, (2, 6))),
    "index_select": (lambda x: x.index_select(0, ROWS.to(x.device)), (MATRIX,)),
    "linear": (F.linear, (MATRIX, (3, 6), (3,))),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), (MATRIX,)),
}


def with_gradients(function: Function, inputs: Tensors, device: str) -> Tensors:
    # Tensor.npu() would make float32 of float64
    leaves = [torch.empty_like(x, device=device).copy_(x).requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    out.backward(torch.empty_like(dout, device=device).copy_(dout))
    results = [out.detach(), *(leaf.grad for leaf in leaves)]
    assert all(tensor.device.type == device for tensor in results)
    return [tensor.cpu() for tensor in results]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_on_the_host(name: str, dtype: torch.dtype) -> None:
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    with virtual_ascend.record() as record:
        card = with_gradients(function, inputs, "npu")
    assert not record.launches
    host = with_gradients(function, inputs, "cpu")
    torch.testing.assert_close(card, host)

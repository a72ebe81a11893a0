"""Whatever comes in the place of an argument, an error is ours and names an argument."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from flash_attn_npu import bert_padding
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.layers import rotary
from flash_attn_npu.layers.rotary import RotaryEmbedding
from flash_attn_npu.modules import embedding
from flash_attn_npu.ops import fused_dense, layer_norm, rms_norm
from flash_attn_npu.ops.triton import layer_norm as of_triton
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from tests.helpers import malformed_rowwise as malformed

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(nested|Nested).*prototype", "ignore:Sparse CSR tensor support is in beta"
)
OURS = (ArgumentError, ArgumentTypeError, UnsupportedError)


def complaint(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the error that these arguments raise; None if nothing, or no error."""
    try:
        function(**arguments)
    except OURS as error:
        if error.argument in malformed.parameters(function):
            return None
        return f"names no argument: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", malformed.FUNCTIONS)
def test_one_wrong_value(name: str) -> None:
    function, make = malformed.FUNCTIONS[name]
    assert complaint(function, make()) is None
    assert function(**make()) is not None
    complaints = []
    for argument, value in make().items():
        for kind, wrong in malformed.wrong_values(value).items():
            found = complaint(function, {**make(), argument: wrong})
            if found is not None:
                complaints.append(f"{argument}, {kind}: {found}")
    assert complaints == []


def test_two_wrong_values_at_once() -> None:
    draw = random.Random(7)
    complaints = []
    for _ in range(600):
        name = draw.choice(list(malformed.FUNCTIONS))
        function, make = malformed.FUNCTIONS[name]
        arguments = make()
        chosen = {
            argument: draw.choice(list(malformed.wrong_values(arguments[argument]).items()))
            for argument in draw.sample(list(arguments), min(2, len(arguments)))
        }
        wrong = {argument: value for argument, (_, value) in chosen.items()}
        found = complaint(function, {**arguments, **wrong})
        if found is not None:
            kinds = {argument: kind for argument, (kind, _) in chosen.items()}
            complaints.append(f"{name}, {kinds}: {found}")
    assert complaints == []


def test_nothing_is_written_for_an_error() -> None:
    for name in ("apply_rotary", "apply_rotary_emb_qkv_", "apply_rotary_emb_kv_"):
        function, make = malformed.FUNCTIONS[name]
        for argument, value in make().items():
            for kind, wrong in malformed.wrong_values(value).items():
                arguments = {**make(), argument: wrong}
                x = next(iter(arguments.values()))
                before = x.clone() if isinstance(x, torch.Tensor) and not x.is_meta else None
                try:
                    function(**arguments)
                except OURS:
                    if before is not None and x.layout == torch.strided and not x.is_nested:
                        assert torch.equal(x, before), (name, argument, kind)


X, ROW = torch.randn(2, 3, 8), torch.ones(8)
TABLE = torch.randn(6, 2)
IN_TRANSFORMS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "layer_norm_fn": ("x", lambda x: of_triton.layer_norm_fn(x, ROW, None)),
    "rms_norm": ("x", lambda x: rms_norm.rms_norm(x, ROW, 1e-5)),
    "dropout_add": (
        "x0",
        lambda x: layer_norm.dropout_add_layer_norm(x, None, ROW, None, 0.0, 1e-5),
    ),
    "subset": (
        "x0",
        lambda x: layer_norm.dropout_add_layer_norm_subset(x, None, ROW, None, 0.0, 1e-5),
    ),
    "layer_norm_linear_fn": (
        "x",
        lambda x: of_triton.layer_norm_linear_fn(x, ROW, None, torch.ones(4, 8), None),
    ),
    "rotary": ("x", lambda x: rotary.apply_rotary_emb(x[:, :, None], TABLE, TABLE)),
    "loss": (
        "logits",
        lambda x: cross_entropy_loss(x.flatten(0, 1), torch.zeros(6, dtype=torch.long))[0],
    ),
    "index": ("input", lambda x: bert_padding.index_first_axis(x, torch.tensor([1]))),
    "dense": ("x", lambda x: fused_dense.fused_dense_func(x, torch.ones(4, 8))),
    "mlp": (
        "x",
        lambda x: fused_dense.fused_mlp_func(x, torch.ones(4, 8), torch.ones(8, 4)),
    ),
}


@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_transforms_of_functorch_are_refused(name: str) -> None:
    argument, call = IN_TRANSFORMS[name]
    assert call(X.clone().requires_grad_()).requires_grad
    with pytest.raises(UnsupportedError, match=f"^{argument}: got a tensor inside a transform"):
        torch.func.grad(lambda x: call(x).sum())(X)


def test_sizes_of_modules() -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("vocab_size", lambda: embedding.GPT2Embeddings(4, -1, 2)),
        ("vocab_size", lambda: embedding.BertEmbeddings(4, 2**33, 2, 2)),
        ("embed_dim", lambda: embedding.GPT2Embeddings(2**40, 5, 2)),
        ("max_position_embeddings", lambda: embedding.GPT2Embeddings(4, 5, 2**40)),
        ("type_vocab_size", lambda: embedding.BertEmbeddings(4, 5, 2, 2**40)),
        ("num_embeddings", lambda: embedding.VocabParallelEmbedding(2**40, 4)),
        ("out_features", lambda: fused_dense.ColumnParallelLinear(4, -2, None)),
        ("multiple_of", lambda: fused_dense.RowParallelLinear(4, 2, None, multiple_of=-1)),
        ("seqlen_offset", lambda: RotaryEmbedding(8)(torch.ones(1, 2, 3, 1, 8), None, 2**40)),
    ]
    for argument, call in calls:
        with pytest.raises(ArgumentError, match=f"^{argument}: got .*; allowed: an int, "):
            call()
    with pytest.raises(ArgumentTypeError, match=r"^process_group: got 'x'"):
        embedding.VocabParallelEmbedding(4, 4, process_group="x")  # type: ignore[arg-type]

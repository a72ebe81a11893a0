"""Calls of composed attention with every option, and what the reference says of them.

A tile of the composed kernel holds up to 512 x 512 scores, more than small problems have, so
`tiles_of` makes tiles small: a few tokens spread over many of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu._core.kernels.composed import tiles
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func, npu_flash_attn_varlen_func
from tests.helpers import reference
from tests.helpers.property_harness import lengths_on
from tests.helpers.strategies import Problem

Named = dict[str, Tensor]
FLOAT64_NOISE = 512 * torch.finfo(torch.float64).eps


@contextmanager
def tiles_of(side: int) -> Iterator[None]:
    """Composed attention works by tiles of `side` x `side` scores: the bounds on a tile's side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SMALLEST_TILE", side)
        patch.setattr(tiles, "LARGEST_TILE", side)
        patch.setattr(tiles, "LARGEST_TILE_ON_CPU", side)
        patch.setattr(tiles, "WIDER", 1)
        yield


@dataclass(frozen=True)
class Case:
    """A call: `slopes` is "", "heads" or "sequences"; keys grow along a sequence up to `loud`.

    Where `loud` is large the largest score of a row moves from tile to tile; a negative one lets
    keys fade instead, so that the first tile holds it.
    """

    problem: Problem
    packed: bool = True
    softcap: float = 0.0
    slopes: str = ""
    dropout_p: float = 0.0
    sink: bool = False
    loud: float = 1.0

    def options(self) -> dict[str, Any]:
        """What both the functions and the reference take, tensors on the host."""
        options = self.problem.options | {"softcap": self.softcap, "dropout_p": self.dropout_p}
        nheads = self.problem.nheads
        if self.slopes:
            shape = (len(self.problem.seqlens), nheads)[self.slopes == "heads" :]
            count = torch.Size(shape).numel()
            options["alibi_slopes"] = torch.linspace(0.02, 1.0, count).reshape(shape)
        return options

    def tensors(self) -> Named:
        """q, k, v, dout and the sink, if any, on the host."""
        problem = self.problem
        tensors = problem.packed() if self.packed else problem.dense()
        named = dict(zip(("q", "k", "v", "dout"), tensors, strict=True))
        volume = torch.ones(named["k"].flatten(0, -3).shape[0], dtype=problem.dtype)
        for first, last in pairwise(problem.cu_seqlens_k):
            ramp = torch.linspace(min(1.0, abs(self.loud)), abs(self.loud), last - first)
            volume[first:last] = ramp if self.loud > 0 else ramp.flip(0)
        named["k"] = named["k"] * volume.reshape(*named["k"].shape[:-2], 1, 1)
        if self.sink:
            named["sink"] = torch.linspace(-1.0, 4.0, problem.nheads).to(problem.dtype)
        return named

    def leaves(self, tensors: Named) -> Named:
        names = ("q", "k", "v", "sink") if self.sink else ("q", "k", "v")
        return {name: tensors[name].detach().clone().requires_grad_() for name in names}


def solve(case: Case, device: torch.device, seed: int = 0) -> Named:
    """out, softmax_lse, s_dmask and every gradient; a sink's call returns the first alone."""
    tensors = {name: x.to(device) for name, x in case.tensors().items()}
    leaves = case.leaves(tensors)
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in case.options().items()}
    torch.manual_seed(seed)
    out, *others = _call(case, leaves, options, device)
    answer = dict(zip(("softmax_lse", "s_dmask"), others, strict=False)) | {"out": out}
    gradients = torch.autograd.grad(out, list(leaves.values()), tensors["dout"])
    return answer | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def _call(case: Case, leaves: Named, options: dict[str, Any], device: torch.device) -> tuple:
    problem = case.problem
    if case.sink:
        function = npu_flash_attn_varlen_func if case.packed else npu_flash_attn_func
        more = {"s_aux": leaves["sink"]}
    else:
        function = flash_attn_varlen_func if case.packed else flash_attn_func
        more = {"return_attn_probs": True}
    lengths: tuple = ()
    if case.packed:
        lengths = (
            lengths_on(device, problem.cu_seqlens_q),
            lengths_on(device, problem.cu_seqlens_k),
            problem.max_seqlen_q,
            problem.max_seqlen_k,
        )
    result = function(*(leaves[name] for name in "qkv"), *lengths, **options, **more)
    return result if isinstance(result, tuple) else (result,)


def masks(case: Case, s_dmask: Tensor) -> list[Tensor]:
    """[nheads, seqlen_q, seqlen_k] for each sequence, True where S_dmask says kept."""
    kept = ~torch.signbit(s_dmask.cpu())
    sizes = case.problem.seqlens
    return [square[:, :rows, :keys] for square, (rows, keys) in zip(kept, sizes, strict=True)]


def expected(case: Case, dropout_mask: Sequence[Tensor] | None) -> dict[str, tuple[Tensor, ...]]:
    """Each result three times: exact, in the precision of the inputs, and from a stored out."""
    options = case.options() | {"dropout_mask": dropout_mask}
    tensors, dtype = case.tensors(), case.problem.dtype
    doubles = {name: x.double() for name, x in tensors.items()}
    ways = [
        _reference(case, doubles, options),
        _reference(case, tensors, options | {"attend": reference.same_precision}),
        _reference(case, doubles, options, out_dtype=dtype),
    ]
    return {name: tuple(way[name] for way in ways) for name in ways[0]}


def _reference(
    case: Case, tensors: Named, options: dict[str, Any], out_dtype: torch.dtype | None = None
) -> Named:
    leaves, problem = case.leaves(tensors), case.problem
    function = reference.dense
    if case.packed:
        lengths = {"cu_seqlens_q": problem.cu_seqlens_q, "cu_seqlens_k": problem.cu_seqlens_k}
        function = partial(reference.varlen, max_seqlen_k=problem.max_seqlen_k, **lengths)
    result = function(**leaves, **options)
    outputs, given = [result.out], [tensors["dout"]]
    if out_dtype is not None:
        # as in reference.with_gradients: rowsum(dout * out) of a rounded out
        lost = result.out.detach() - result.out.detach().to(out_dtype)
        outputs.append(result.softmax_lse)
        given.append((tensors["dout"] * lost).sum(-1).transpose(-1, -2))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    answer = {"out": result.out, "softmax_lse": result.softmax_lse}
    return answer | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_case(case: Case, device: torch.device) -> Named:
    """The answer of the call is the reference's, gradients too."""
    answer = solve(case, device)
    dropout_mask = None
    if case.dropout_p:
        # with a sink the call shows no mask; it is that of the same call without
        shown = solve(replace(case, sink=False), device) if case.sink else answer
        dropout_mask = masks(case, shown["s_dmask"])
    truth = expected(case, dropout_mask)
    lse = truth["softmax_lse"][0]
    highest = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    for name, (exact, plain, inherent) in truth.items():
        if name not in answer:
            continue
        if case.problem.dtype == torch.float64:
            _assert_double(answer[name], exact, name)
        elif name == "softmax_lse":
            reference.assert_lse_close(answer[name], exact)
        else:
            assert answer[name].dtype == case.problem.dtype
            loudness = max(1.0, abs(case.loud)) if name == "dq" else 1.0
            loudest = highest if name != "out" and abs(case.loud) > 1 else 0.0
            reference.assert_close_to_reference(
                answer[name], exact, plain, name, inherent, loudness, loudest
            )
    return answer


def _assert_double(actual: Tensor, exact: Tensor, name: str) -> None:
    """float64 is computed in float64: the bounds of reference.py with that dtype's epsilon."""
    assert actual.dtype == torch.float64, name
    finite = exact.isfinite()
    actual = actual.detach().cpu()
    assert torch.equal(actual[~finite], exact[~finite]), name
    scale = max(1.0, exact[finite].abs().max().item()) if finite.any() else 1.0
    torch.testing.assert_close(actual[finite], exact[finite], rtol=0, atol=FLOAT64_NOISE * scale)

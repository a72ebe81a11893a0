"""What the tests of single arguments share: a call as its arguments, and the oracle's answer to it.

A call is a dict of upstream's argument names with host tensors, so the same dict goes to the
function and to the reference. Beside them it holds `dout` and `dropout_mask`, which a public
function does not take.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import reference
from tests.helpers.strategies import Problem

Arguments = dict[str, Any]
Answer = dict[str, Tensor]
BLOCK = 128


class Truth(NamedTuple):
    """A tensor in float64, in the precision of the inputs, and as the interface allows it."""

    exact: Tensor
    plain: Tensor
    inherent: Tensor | None = None


def parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def is_varlen(function: Callable) -> bool:
    return "varlen" in function.__name__


def arguments_for(function: Callable, problem: Problem) -> Arguments:
    """A complete call of `function`: all of its arguments, most with their neutral value."""
    tensors = problem.packed() if is_varlen(function) else problem.dense()
    q, k, v, dout = tensors
    pool = {
        "q": q,
        "k": k,
        "v": v,
        "dout": dout,
        "cu_seqlens_q": int32(problem.cu_seqlens_q),
        "cu_seqlens_k": int32(problem.cu_seqlens_k),
        "cu_seqlens": int32(problem.cu_seqlens_k),
        # room for a boundary that moves by one row
        "max_seqlen_q": problem.max_seqlen_q + 1,
        "max_seqlen_k": problem.max_seqlen_k + 1,
        "max_seqlen": problem.max_seqlen_k + 1,
        "softmax_scale": problem.headdim**-0.5,
        "dropout_p": 0.0,
        "causal": problem.causal,
        "window_size": problem.window_size,
        "window_size_left": problem.window_size[0],
        "window_size_right": problem.window_size[1],
        "softcap": 0.0,
        "deterministic": False,
        "return_attn_probs": False,
        "return_softmax": False,
        "zero_tensors": False,
        "num_splits": 0,
    }
    pool |= {"kv": torch.stack((k, v), -3)} if k.shape == v.shape else {}
    pool |= {"qkv": torch.stack((q, k, v), -3)} if q.shape == k.shape else {}
    call = {name: pool.get(name) for name in parameters(function)} | {"dout": dout}
    if "softmax_lse" in call:
        call |= saved_by_forward(call) | {
            f"d{x}": torch.full_like(call[x], torch.nan) for x in "qkv"
        }
    return call


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def saved_by_forward(call: Arguments) -> Arguments:
    """The out and softmax_lse of a forward, as exact as their dtypes allow."""
    result = solver(call)(*(x.double() for x in inputs_of(call)))
    return {"out": result.out.to(call["q"].dtype), "softmax_lse": result.softmax_lse.float()}


def run(function: Callable, call: Arguments, device: torch.device) -> Answer:
    """Make the call on `device`: what it returns or writes, by name, and its gradients."""
    there = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in call.items()}
    # the seed and offset of a dropout mask stay on the host
    there |= {"rng_state": call["rng_state"]} if "rng_state" in call else {}
    given = {name: there[name] for name in parameters(function)}
    if "dq" in given:
        row_sums = function(**given)
        return {"dq": given["dq"], "dk": given["dk"], "dv": given["dv"], "row_sums": row_sums}
    if "return_softmax" in given:
        answer = function(**given)
        return dict(zip(("out", "softmax_lse", "s_dmask", "rng_state"), answer, strict=True))
    leaves = {
        x: given[x].detach().requires_grad_() for x in ("q", "k", "v", "qkv", "kv") if x in given
    }
    result = function(**(given | leaves))
    names = ("out", "softmax_lse", "s_dmask")
    answer = dict(zip(names, result if isinstance(result, tuple) else (result,), strict=False))
    gradients = torch.autograd.grad(answer["out"], leaves.values(), there["dout"])
    for name, gradient in zip(leaves, gradients, strict=True):
        parts = gradient.unbind(-3) if len(name) > 1 else (gradient,)
        answer |= {f"d{letter}": part for letter, part in zip(name, parts, strict=True)}
    return answer


def inputs_of(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    if "qkv" in call:
        return call["qkv"].unbind(-3)
    if "kv" in call:
        return (call["q"], *call["kv"].unbind(-3))
    return call["q"], call["k"], call["v"]


def lengths_of(call: Arguments) -> tuple[list[int], list[int]] | None:
    """The cumulative lengths of a packed call."""
    if "cu_seqlens" in call:
        return call["cu_seqlens"].tolist(), call["cu_seqlens"].tolist()
    if "cu_seqlens_q" in call:
        return call["cu_seqlens_q"].tolist(), call["cu_seqlens_k"].tolist()
    return None


def solver(call: Arguments) -> Callable[..., reference.Result]:
    """The reference with the options of the call, still to be given q, k and v."""
    options = {x: call[x] for x in ("softmax_scale", "causal", "softcap", "alibi_slopes")}
    if "window_size" in call:
        options["window_size"] = call["window_size"]
    else:
        options["window_size"] = (call["window_size_left"], call["window_size_right"])
    if call["dropout_p"]:
        options |= {"dropout_p": call["dropout_p"], "dropout_mask": call["dropout_mask"]}
    lengths = lengths_of(call)
    if lengths is None:
        return partial(reference.dense, **options)
    options["max_seqlen_k"] = call.get("max_seqlen_k", call.get("max_seqlen"))
    where, keys = gathered(call)

    def solve(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> reference.Result:
        k, v = (x.reshape(-1, *x.shape[-2:])[where] for x in (k, v))
        return reference.varlen(q, k, v, lengths[0], keys, **options, **more)

    return solve


def gathered(call: Arguments) -> tuple[Tensor, list[int]]:
    """The rows of k and v, pages flattened, that are seen, and their cumulative lengths."""
    cumulative = lengths_of(call)[1]
    given = [call.get(name) for name in ("seqused_k", "leftpad_k")]
    used, pads = (None if x is None else x.tolist() for x in given)
    rows = []
    for index, (start, end) in enumerate(pairwise(cumulative)):
        length = end - start if used is None else used[index]
        position = torch.arange(0 if pads is None else pads[index], length)
        if call.get("block_table") is None:
            rows.append(start + position)
            continue
        page = call["k"].shape[1]
        rows.append(call["block_table"][index].long()[position // page] * page + position % page)
    return torch.cat(rows), list(accumulate(map(len, rows), initial=0))


def in_pages(call: Arguments, page: int = 4) -> Arguments:
    """The keys of a packed call in pages, all of them in use, and the table of these."""
    spans = list(pairwise(call["cu_seqlens_k"].tolist()))
    per_sequence = -(-max(end - start for start, end in spans) // page)
    blocks = torch.arange(len(spans) * per_sequence).flip(0).view(len(spans), per_sequence)
    paged = {"block_table": blocks.to(torch.int32)}
    for name in ("k", "v"):
        pages = call[name].new_zeros(blocks.numel(), page, *call[name].shape[1:])
        for row, (start, end) in zip(blocks, spans, strict=True):
            position = torch.arange(end - start)
            pages[row[position // page], position % page] = call[name][start:end]
        paged[name] = pages
    return paged


def truth(function: Callable, call: Arguments) -> dict[str, Truth]:
    """The right answer to a call, by name."""
    if "softmax_lse" in parameters(function):
        return backward_truth(call)
    solve, inputs, dout = solver(call), inputs_of(call), call["dout"]
    doubles = [x.double() for x in inputs]
    exact, gradients = reference.with_gradients(solve, *doubles, dout.double())
    stored = reference.with_gradients(solve, *doubles, dout.double(), out_dtype=dout.dtype)[1]
    solve_plain = partial(solve, attend=reference.same_precision)
    plain, plain_gradients = reference.with_gradients(solve_plain, *inputs, dout)
    answer = {
        "out": Truth(exact.out, plain.out),
        "softmax_lse": Truth(exact.softmax_lse, plain.softmax_lse),
    }
    for name, *tensors in zip("qkv", gradients, plain_gradients, stored, strict=True):
        answer[f"d{name}"] = Truth(*tensors)
    return answer


def backward_truth(call: Arguments) -> dict[str, Truth]:
    """The gradients that follow from the out and softmax_lse of the call, whatever these are.

    Probabilities exp(score - lse) differ from the softmax by a factor for each row, which may
    as well be on dout; and as the gradient of the lse is the softmax, rowsum(dout * out) is met
    through a gradient of the lse.
    """
    solve, inputs = solver(call), inputs_of(call)
    leaves = [x.double().requires_grad_() for x in inputs]
    exact = solve(*leaves)
    surplus = (exact.softmax_lse - call["softmax_lse"].double()).detach()
    factor = torch.exp(surplus.masked_fill(~exact.softmax_lse.isfinite(), -torch.inf))
    dout = call["dout"].double() * factor.transpose(-1, -2)[..., None]
    dlse = (dout * (exact.out.detach() - call["out"].double())).sum(-1).transpose(-1, -2)
    gradients = torch.autograd.grad((exact.out, exact.softmax_lse), leaves, (dout, dlse))
    plain_leaves = [x.detach().clone().requires_grad_() for x in inputs]
    plain = solve(*plain_leaves, attend=reference.same_precision)
    outputs = (plain.out, plain.softmax_lse)
    given = (dout.to(plain.out.dtype), dlse.to(plain.softmax_lse.dtype))
    plain_gradients = torch.autograd.grad(outputs, plain_leaves, given)
    triples = zip("qkv", gradients, plain_gradients, strict=True)
    return {f"d{name}": Truth(*pair) for name, *pair in triples}


def assert_right(answer: Answer, expected: dict[str, Truth]) -> None:
    """Everything that both hold agrees, by upstream's rule."""
    for name in answer.keys() & expected.keys():
        exact, plain, inherent = expected[name]
        if name == "softmax_lse":
            reference.assert_lse_close(answer[name], exact)
        else:
            reference.assert_close_to_reference(answer[name], exact, plain, name, inherent)


def masks_from(s_dmask: Tensor, call: Arguments) -> list[Tensor]:
    """[nheads, seqlen_q, seqlen_k] for each sequence, True where S_dmask says kept."""
    kept = ~torch.signbit(s_dmask.cpu())
    lengths = lengths_of(call)
    if lengths is None:
        q, k, _ = inputs_of(call)
        return list(kept[:, :, : q.shape[1], : k.shape[1]])
    sizes = zip(*(int32(x).diff().tolist() for x in lengths), strict=True)
    return [square[:, :rows, :keys] for square, (rows, keys) in zip(kept, sizes, strict=True)]

"""The call behind every public attention function: check, look the plan up, run it.

Plans are remembered by what is known of the arguments without reading a tensor, so that all
layers of a model share one and a call costs little more than its kernel. That is why `attend`
is written flat: at this length it adds about 3 us to a kernel launch of 17 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError, explain
from . import checks
from .dispatch import Plan, plan
from .lengths import Lengths, host_lengths
from .problem import Facts, Options, Problem, dense_problem, varlen_problem
from .result import Result

__all__ = ["Answer", "attend", "forget_plans", "refuse_block_table", "unpacked"]

Answer = Tensor | tuple[Tensor, Tensor, Tensor]

PLANS = 256
"""Plans that are remembered; at the next one all are dropped."""

_plans: dict[tuple[Any, ...], Plan] = {}


def attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int] | None,
    cu_seqlens_k: Tensor | Sequence[int] | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Answer:
    """Attention over dense tensors if cu_seqlens_q is None, else over packed ones."""
    lengths_q = lengths_k = key = found = None
    if cu_seqlens_q is not None:
        lengths_q = host_lengths("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is cu_seqlens_q:
            lengths_k = lengths_q
        else:
            lengths_k = host_lengths("cu_seqlens_k", cu_seqlens_k)
        if type(max_seqlen_q) is not int:
            max_seqlen_q = checks.host_int("max_seqlen_q", max_seqlen_q)
        if type(max_seqlen_k) is not int:
            max_seqlen_k = checks.host_int("max_seqlen_k", max_seqlen_k)
    try:
        # fmt: off
        key = (
            function, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, lengths_q, lengths_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size, softcap,
            None if alibi_slopes is None else Facts.of(alibi_slopes),
            deterministic, return_attn_probs,
            torch.is_grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad),
        )
        # fmt: on
        found = _plans.get(key)
    except (AttributeError, TypeError):
        # not a tensor, or not hashable: the checks below accept it or name it
        key = None
    if found is None:
        checks.require_tensors(q=q, k=k, v=v)
        options = _options(
            *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
            *(deterministic, return_attn_probs),
        )
        assert not isinstance(max_seqlen_q, Tensor)
        assert not isinstance(max_seqlen_k, Tensor)
        lengths = (lengths_q, lengths_k, max_seqlen_q, max_seqlen_k)
        found = plan(_problem(function, q, k, v, *lengths, options))
        _remember(key, found)
    found.tally.calls += 1
    result = found.run(q, k, v, alibi_slopes)
    if found.bare:
        return result  # type: ignore[no-any-return]
    return _answer(found.problem, result, q)


def _answer(problem: Problem, result: Result, q: Tensor) -> Answer:
    if not problem.return_attn_probs:
        return result.out
    assert result.softmax_lse is not None
    return result.out, result.softmax_lse, q.new_empty(0)


def _problem(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Lengths | None,
    lengths_k: Lengths | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    options: Options,
) -> Problem:
    tensors = (Facts.of(q), Facts.of(k), Facts.of(v))
    if lengths_q is None or lengths_k is None:
        return dense_problem(function, *tensors, options)
    return varlen_problem(
        function, *tensors, lengths_q, lengths_k, max_seqlen_q, max_seqlen_k, options
    )


def _remember(key: tuple[Any, ...] | None, found: Plan) -> None:
    # a scale given as a tensor may change under the same key
    if key is None or any(isinstance(part, Tensor) for part in key):
        return
    if len(_plans) >= PLANS:
        _plans.clear()
    _plans[key] = found


def _options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
) -> Options:
    if alibi_slopes is not None:
        checks.require_tensors(alibi_slopes=alibi_slopes)
    return Options(
        dropout_p=checks.real("dropout_p", dropout_p),
        softmax_scale=None
        if softmax_scale is None
        else checks.real("softmax_scale", softmax_scale),
        causal=checks.flag("causal", causal),
        window_size=checks.window("window_size", window_size),
        softcap=checks.real("softcap", softcap),
        alibi_slopes=None if alibi_slopes is None else Facts.of(alibi_slopes),
        deterministic=checks.flag("deterministic", deterministic),
        return_attn_probs=checks.flag("return_attn_probs", return_attn_probs),
        needs_grad=torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad),
    )


def unpacked(argument: str, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The parts of a (..., parts, nheads, headdim) tensor, as views."""
    checks.require_tensors(**{argument: packed})
    if packed.dim() not in (4, 5) or packed.shape[-3] != parts:
        raise ArgumentError(
            explain(
                argument,
                f"shape {tuple(packed.shape)}",
                f"(batch, seqlen, {parts}, nheads, headdim) or (total, {parts}, nheads, headdim)",
                f"stack the {parts} tensors along dimension -3",
            )
        )
    return packed.unbind(-3)


def refuse_block_table(function: str) -> NoReturn:
    """Paged keys are not served yet."""
    raise UnsupportedError(
        explain(
            "block_table",
            "a tensor",
            f"None: {function} does not serve paged keys yet",
            "gather the pages into packed k and v and call again without block_table",
        )
    )


def forget_plans() -> None:
    """Drop every remembered plan; the next calls decide again."""
    _plans.clear()

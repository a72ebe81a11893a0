"""The call behind every public attention function.

Where the fused kernel is differentiable by itself it is called at once: this path is written
for speed, and adds about 3 us to a launch of 17 us. Everything else is served by `serving`, and
what is being traced goes through the operators of `operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground import arguments
from ..ground.functions import EAGER, FORWARD, PLAIN, refuse_tangents
from ..ground.lengths import Lengths, host_lengths, lengths_read, recall_lengths
from ..problems.ask import Ask, Facts, Options, Packed
from ..problems.results import Inputs
from ..problems.validation import describe
from ..table.choice import Plan, recall
from ..verification.kinds import Refuted
from . import meta, operators, paged, serving
from .asking import make_plan, new_plan

__all__ = ["Answer", "attend", "attend_narrow", "attend_paged", "unpacked"]

Answer = Tensor | tuple[Tensor, Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
Lengthy = Tensor | Sequence[int] | None
Raw = tuple[Any, ...]
"""Arguments as they came: `Options` in its order, or cu_seqlens_q, _k, max_seqlen_q, _k."""

_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_grad_enabled = torch.is_grad_enabled


def attend(
    function: str,
    inputs: Triple,
    lengths: Raw | None,
    options: Raw,
    alibi_slopes: Tensor | None,
    sink: Tensor | None = None,
) -> Answer:
    """Attention over packed tensors, or over dense ones, which have no lengths."""
    if _compiling() or _dispatch_modes() or (lengths is not None and _tracing()):
        return operators.attend(function, inputs, lengths, options, alibi_slopes, sink)
    q, k, v = inputs
    if FORWARD._current_level >= 0:
        refuse_tangents(EAGER, q=q, k=k, v=v, alibi_slopes=alibi_slopes, sink=sink)
    try:
        packed = None if lengths is None else _read(lengths)
    except ArgumentError:
        if lengths is not None and meta.lacks_values(q, lengths):
            return meta.attend(function, inputs, lengths, options, alibi_slopes, sink)
        raise
    try:
        # as `Ask.at_door` takes it
        dtype: Any = q.dtype
        device: Any = q.device
        if not (k.dtype is dtype is v.dtype):
            dtype = (dtype, k.dtype, v.dtype)
        if not (k.device == device == v.device):
            device = (device, k.device, v.device)
        key = (
            function,
            q.shape,
            k.shape,
            v.shape,
            dtype,
            device,
            packed,
            options,
            None if alibi_slopes is None else Facts.of(alibi_slopes),
            None if sink is None else Facts.of(sink),
            _grad_enabled()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or (sink is not None and sink.requires_grad)
            ),
        )
        found = recall(key)
    except AttributeError:
        arguments.require_plain(q=q, k=k, v=v)
        arguments.require_plain_or_none(alibi_slopes=alibi_slopes, sink=sink)
        raise
    except TypeError:
        # an option that cannot be a key: the checks accept it or name it
        found = None
    if found is None:
        # sizes are tensors in a trace, and so no plan was found for them
        if _tracing():
            return operators.attend(function, inputs, lengths, options, alibi_slopes, sink)
        arguments.require_plain(q=q, k=k, v=v)
        found = new_plan(Ask.at_door(key), key)
    direct = found.direct
    if direct is None:
        return _indirect(found, inputs, lengths, options, alibi_slopes, sink)
    found.tally.calls += 1
    try:
        return direct(q, k, v, alibi_slopes, sink)  # type: ignore[no-any-return]
    except Refuted as refuted:
        again = (function, inputs, lengths, options, alibi_slopes, sink)
        return refuted.answer(partial(attend, *again))
    except Exception:
        # what no kernel takes looks to a remembered plan like any tensor of its shape
        arguments.require_plain(q=q, k=k, v=v)
        if _functorch() is None:
            raise
    # torch_npu's operators have no rule for vmap: torch calls ours once for each element
    return operators.attend(function, inputs, lengths, options, alibi_slopes, sink)


def _read(lengths: Raw) -> Raw:
    """`_packed`, with `recall_lengths` written out, for what is mostly given."""
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = lengths
    owner: Any
    found_q: Lengths | None
    found_q, entry = None, lengths_read(id(cu_seqlens_q))
    if entry is not None:
        owner, version, address, numel, read = entry
        if (
            owner() is cu_seqlens_q
            and cu_seqlens_q._version == version
            and cu_seqlens_q.data_ptr() == address
            and cu_seqlens_q.numel() == numel
        ):
            found_q = read
    found_k = found_q if cu_seqlens_k is cu_seqlens_q else recall_lengths(cu_seqlens_k)
    if found_q and found_k and type(longest_q) is type(longest_k) is int:
        return found_q, found_k, longest_q, longest_k
    return _packed(*lengths)


def attend_narrow(
    function: str, inputs: Triple, lengths: Raw | None, options: Raw
) -> Answer | None:
    """`attend` with a v of a smaller headdim on an NPU; None where v has to be filled up first."""
    q, k, v = inputs
    arguments.require_plain(q=q, k=k, v=v)
    traced = _compiling() or _dispatch_modes() or _tracing() or _functorch()
    if traced or q.device.type != "npu" or any(type(x) not in PLAIN for x in inputs):
        return None
    if FORWARD._current_level >= 0:
        refuse_tangents(EAGER, q=q, k=k, v=v)
    ask = Ask(
        function,
        q=Facts.of(q),
        k=Facts.of(k),
        v=Facts.of(v),
        packed=None if lengths is None else Packed(*_packed(*lengths)),
        options=Options(*options),
        alibi_slopes=None,
        sink=None,
        needs_grad=_grad_enabled() and any(x.requires_grad for x in inputs),
        uses_lse=options[-1],
        narrow=True,
    )
    found = make_plan(ask)
    if found.direct is None:
        return serving.attend(found, Inputs(*inputs))
    found.tally.calls += 1
    try:
        return found.direct(*inputs, None, None)  # type: ignore[no-any-return]
    except Refuted as refuted:
        return refuted.answer(partial(attend_narrow, function, inputs, lengths, options))


def _indirect(
    found: Plan,
    inputs: Triple,
    lengths: Raw | None,
    options: Raw,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
) -> Answer:
    """Attention by a kernel without autograd of its own."""
    q, k, v = inputs
    arguments.require_plain(q=q, k=k, v=v)
    arguments.require_plain_or_none(alibi_slopes=alibi_slopes, sink=sink)
    tensors = (*inputs, alibi_slopes, sink)
    if q.is_meta or _functorch() or any(type(x) not in PLAIN for x in tensors if x is not None):
        # these need an operator's fake, or its rules
        function = found.problem.function
        return operators.attend(function, inputs, lengths, options, alibi_slopes, sink)
    return serving.attend(found, Inputs(q, k, v, alibi_slopes, sink))


def _packed(
    cu_seqlens_q: Lengthy, cu_seqlens_k: Lengthy, max_seqlen_q: Any, max_seqlen_k: Any
) -> tuple[Lengths, Lengths, int, int]:
    """The fields of Packed, in their order."""
    lengths_q = recall_lengths(cu_seqlens_q) or host_lengths("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is cu_seqlens_q:
        lengths_k = lengths_q
    else:
        lengths_k = recall_lengths(cu_seqlens_k) or host_lengths("cu_seqlens_k", cu_seqlens_k)
    if type(max_seqlen_q) is not int:
        max_seqlen_q = arguments.longest("max_seqlen_q", max_seqlen_q, lengths_q.longest)
    if type(max_seqlen_k) is not int:
        max_seqlen_k = arguments.longest("max_seqlen_k", max_seqlen_k, lengths_k.longest)
    return lengths_q, lengths_k, max_seqlen_q, max_seqlen_k


def unpacked(argument: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    """The parts of a (batch, seqlen, parts, nheads, headdim) or (total, ...) tensor, as views.

    Args:
        dims: 5 for a padded batch, 4 for packed sequences.
    """
    arguments.require_plain(**{argument: packed})
    if packed.dim() != dims or packed.shape[-3] != parts:
        tokens = "(batch, seqlen" if dims == 5 else "(total"
        raise ArgumentError(
            argument,
            f"shape {tuple(packed.shape)}",
            f"{tokens}, {parts}, nheads, headdim)",
            f"stack the {parts} tensors along dimension -3; packed sequences go to the varlen "
            "functions, padded batches to the others",
        )
    return packed.unbind(-3)


def attend_paged(
    function: str,
    inputs: Triple,
    lengths: Raw,
    options: Raw,
    alibi_slopes: Tensor | None,
    block_table: Tensor,
) -> Answer:
    """`attend` over keys in pages; where a gradient is wanted they are gathered first."""
    q, k, v = inputs
    arguments.require_plain(q=q, k=k, v=v, block_table=block_table)
    needs_grad = _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not needs_grad and (_compiling() or _dispatch_modes()):
        return operators.attend(
            function, inputs, lengths, options, alibi_slopes, block_table=block_table
        )
    arguments.require_plain_or_none(alibi_slopes=alibi_slopes)
    if FORWARD._current_level >= 0:
        refuse_tangents(EAGER, q=q, k=k, v=v, alibi_slopes=alibi_slopes)
    if meta.lacks_values(q, (*lengths, block_table)):
        return meta.attend(
            function, inputs, lengths, options, alibi_slopes, block_table=block_table
        )
    plain, packed = Options.checked(*options), _packed(*lengths)
    if not needs_grad:
        lengths = (*lengths[:2], *packed[2:])
        return operators.attend(
            function, inputs, lengths, plain, alibi_slopes, block_table=block_table
        )
    keys = paged.read_keys(k, v, packed[1], paged.Placement(block_table))
    # what is refused is refused before anything is copied
    describe(
        Ask(
            function,
            Facts.of(q),
            *keys.facts,
            packed=Packed(packed[0], keys.lengths, *packed[2:]),
            options=plain,
            alibi_slopes=None if alibi_slopes is None else Facts.of(alibi_slopes),
            sink=None,
            needs_grad=needs_grad,
            uses_lse=plain.return_attn_probs,
        )
    )
    gathered = (lengths[0], keys.lengths.cumulative, *packed[2:])
    return attend(function, (q, *paged.gather(function, keys)), gathered, plain, alibi_slopes)

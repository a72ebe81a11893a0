"""torch's own flash attention operators on devices that have none: `register_torch`.

`torch.nn.attention.varlen.varlen_attn`, and what is built on it (torchtitan), calls
`aten::_flash_attention_forward` and `_backward`: flash-attention 2 itself on CUDA, and nothing
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import flash_attn_interface
from .._core.ground.locks import Lock
from .._core.problems.attention import default_scale
from ..errors import UnsupportedError

__all__ = ["Registration", "register_torch"]

KEYS = ("PrivateUse1", "CPU")
"""Whose dispatch keys get the kernels; PrivateUse1 is the NPU's."""

_lock = Lock()
_claims: set[Registration] = set()
_libraries: list[torch.library.Library] = []


class Registration:
    """One claim on torch's operators; the kernels stay until every claim is removed.

    A `FlashAttentionHandle` of `torch.nn.attention`, and a context manager.
    """

    def remove(self) -> None:
        """Give this claim up; a second call does nothing."""
        with _lock:
            _claims.discard(self)
            if not _claims:
                while _libraries:
                    _libraries.pop()._destroy()

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def register_torch() -> Registration:
    """Give `aten::_flash_attention_forward` and `_backward` a kernel on NPU and CPU.

    Then `torch.nn.attention.varlen.varlen_attn` runs there, forward and backward. Nothing else
    calls this, neither import nor `install()`: torch's operators are everybody's. An operator that
    has a kernel for a device already keeps it.

    Returns:
        A handle with `.remove()`, usable as a context manager. torch's registry of providers takes
        the function as it is:
        `torch.nn.attention.register_flash_attention_impl("NPU", register_fn=register_torch)`.
    """
    claim = Registration()
    with _lock:
        if not _claims:
            _libraries.extend(_registered(key) for key in KEYS)
        _claims.add(claim)
    return claim


def _registered(key: str) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL", key)
    for name, serve in _KERNELS.items():
        operator = getattr(torch.ops.aten, name, None)
        # a later torch may bring one of its own
        if operator and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            library.impl(name, _by_name(operator.default._schema, serve), key)
    return library


def _by_name(schema: Any, serve: Callable[..., Any]) -> Callable[..., Any]:
    """`serve`, called by the names of the installed operator's arguments."""
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    known = set(serve.__annotations__)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in [name for name in given if name not in known]:
            value = given.pop(name)
            if value is not defaults[name] and value != defaults[name]:
                raise UnsupportedError(
                    name,
                    value,
                    f"{defaults[name]} in {schema.name}",
                    "leave it out: it came with a torch newer than this flash_attn_npu",
                )
        return serve(**given)

    return kernel


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared = _options(query, scale, window_size_left, window_size_right) | {
        "dropout_p": dropout_p,
        "causal": is_causal,
        "alibi_slopes": alibi_slopes,
        "return_softmax": return_debug_mask,
    }
    if cum_seq_q is None:
        for name, given in (("seqused_k", seqused_k), ("block_table", block_table)):
            if given is not None:
                raise UnsupportedError(
                    name, "a tensor", "None for a dense call", "pass cum_seq_q and cum_seq_k too"
                )
        answer = flash_attn_interface._flash_attn_forward(query, key, value, **shared)
    else:
        answer = flash_attn_interface._flash_attn_varlen_forward(
            query,
            key,
            value,
            cum_seq_q,
            _key_ends(cum_seq_k, seqused_k),
            max_q,
            max_k,
            block_table=block_table,
            seqused_k=seqused_k,
            **shared,
        )
    out, lse, probabilities, rng_state = answer
    return out, lse, rng_state, query.new_empty(0), probabilities


def _forward_into(out: Tensor, **arguments: Any) -> Tensor:
    computed, lse, *_ = _forward(**arguments)
    out.copy_(computed)
    return lse


_forward_into.__annotations__ = {"out": Tensor, **_forward.__annotations__}


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # torch's varlen_attn hands over a state of its own making where there is no dropout
    shared = _options(query, scale, window_size_left, window_size_right) | {
        "dropout_p": dropout_p,
        "causal": is_causal,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": rng_state if dropout_p > 0 else None,
    }
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    given = (grad_out, query, key, value, out, logsumexp, *gradients)
    if cum_seq_q is None:
        flash_attn_interface._flash_attn_backward(*given, **shared)
    else:
        ends = cum_seq_q, _key_ends(cum_seq_k, None)
        flash_attn_interface._flash_attn_varlen_backward(*given, *ends, max_q, max_k, **shared)
    return gradients


def _options(
    query: Tensor, scale: float | None, left: int | None, right: int | None
) -> dict[str, Any]:
    """What torch leaves out, or says otherwise, in both directions."""
    return {
        "softmax_scale": default_scale(query.shape[-1]) if scale is None else scale,
        "window_size_left": -1 if left is None else left,
        "window_size_right": -1 if right is None else right,
        "softcap": 0.0,
    }


def _key_ends(cum_seq_k: Tensor | None, seqused_k: Tensor | None) -> Tensor:
    """Where the keys of each sequence end; keys in pages may come with their numbers alone."""
    if cum_seq_k is not None:
        return cum_seq_k
    if seqused_k is None:
        raise UnsupportedError(
            "cum_seq_k", "None", "a tensor, or seqused_k", "pass how many keys each sequence has"
        )
    return torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))


_KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_into,
    "_flash_attention_backward": _backward,
}

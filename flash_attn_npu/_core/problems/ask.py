"""One call as a value: what is asked of attention, without the tensors.

`Ask` is made at the door and nobody spells its fields out again. It is the key under which a
plan is remembered, so its fields are all that a plan depends on. The hot path has a key of its
own, `Ask.at_door`: a flat, plain tuple costs 0.1 us, an Ask 1.8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..ground import arguments
from ..ground.lengths import Lengths

__all__ = ["Ask", "Facts", "Options", "Packed", "Pages"]


class Facts(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor | Facts) -> Facts:
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Packed(NamedTuple):
    """The lengths of packed sequences, and the longest that the caller speaks of."""

    q: Lengths
    k: Lengths
    max_seqlen_q: int
    max_seqlen_k: int


class Pages(NamedTuple):
    """How the keys of a problem lie in a cache.

    size: positions of a page, as a kernel may see the cache without copying it; None if it
        cannot. A row of an unpaged cache counts as so many pages.
    contiguous: the cache is.
    padded: the keys of some sequence do not start at its first position.
    shared: the sequences use more pages together than the cache has.
    in_order: it has no pages, and row i of it holds the keys of sequence i.
    """

    size: int | None
    contiguous: bool
    padded: bool
    shared: bool
    in_order: bool = False


class Options(NamedTuple):
    """The arguments that all attention functions share, in one order, as plain Python values."""

    dropout_p: float = 0.0
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    deterministic: bool = False
    return_attn_probs: bool = False

    @classmethod
    def checked(cls, *values: Any) -> Options:
        """Options in this order, as they came, checked one by one."""
        dropout_p, scale, causal, window_size, softcap, deterministic, probs = values
        return cls(
            arguments.real("dropout_p", dropout_p),
            None if scale is None else arguments.real("softmax_scale", scale),
            arguments.flag("causal", causal),
            arguments.window("window_size", window_size),
            arguments.real("softcap", softcap),
            arguments.flag("deterministic", deterministic),
            arguments.flag("return_attn_probs", probs),
        )


class Ask(NamedTuple):
    """Everything that the plan for a call depends on.

    function: the public function, as users know it.
    packed: None for dense tensors (batch, seqlen, nheads, headdim).
    needs_grad: a backward will be asked for, or is.
    uses_lse: softmax_lse is returned, or given to a backward.
    mask_from: the kernel that drew the dropout mask which a backward has to repeat.
    pages: how the keys lie in a cache; k and v are then the facts of the packed tensors that the
        cache stands for.
    backward: this is one, from (out, softmax_lse).
    narrow: v may have a smaller headdim than q and k, as FlashAttention 3 has it.
    """

    function: str
    q: Facts
    k: Facts
    v: Facts
    packed: Packed | None
    options: Options
    alibi_slopes: Facts | None
    sink: Facts | None
    needs_grad: bool
    uses_lse: bool
    mask_from: str | None = None
    pages: Pages | None = None
    backward: bool = False
    narrow: bool = False

    @classmethod
    def at_door(cls, key: tuple[Any, ...]) -> Ask:
        """From the key of the hot path.

        That is: function, the shapes of q, k and v, their dtype and their device, or the three
        where they differ, packed, options, alibi_slopes, sink, needs_grad. Attention is asked for
        as a public function does.
        """
        function, *shapes, dtype, device, packed, options, alibi_slopes, sink, needs_grad = key
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 3
        devices = device if isinstance(device, tuple) else (device,) * 3
        q, k, v = map(Facts, shapes, dtypes, devices)
        return cls(
            function,
            q=q,
            k=k,
            v=v,
            packed=None if packed is None else Packed(*packed),
            options=options,
            alibi_slopes=alibi_slopes,
            sink=sink,
            needs_grad=needs_grad,
            uses_lse=options[-1],
        )

    def checked(self) -> Ask:
        """The same with options as plain values, or an error that names the one that is wrong."""
        options = Options.checked(*self.options)
        uses_lse = bool(self.uses_lse)
        return self._replace(options=options, needs_grad=bool(self.needs_grad), uses_lse=uses_lse)

    @property
    def plain(self) -> bool:
        """Whether a plan may be remembered under the options as they are.

        A number given as a tensor may change under the same key, and an array is none.
        """
        for part in self.options:
            for x in part if isinstance(part, tuple) else (part,):
                if x is not None and type(x) not in (bool, int, float):
                    return False
        return True

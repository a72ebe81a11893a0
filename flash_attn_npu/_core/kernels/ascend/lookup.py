"""npu_mrope: one launch that looks the rows of the tables up and rotates one tensor or two.

Contract: torch_npu's document, and that of aclnnRopeWithSinCosCache. Called outside of autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.memory import PerTensorMemo
from ...problems.rowwise import Lookup, Tables
from ..kernel import Kernel

__all__ = ["LOOKUP", "Pair", "keep", "kept", "side_by_side"]

AT_ONCE = 1 << 26
"""Elements of all tensors: what is written in place needs as much again meanwhile."""

BLOCK_BYTES = 32
MOST_BLOCKS_APART = 65535
"""The kernel counts what lies between two rows of a tensor in blocks, by 16 bits."""


MOST_BYTES = 1 << 26
"""Of a table: it is kept once more, beside the other one."""


@dataclass(eq=False)
class Pair:
    """A cos and a sin of an embedding, in one table as soon as that is asked for."""

    joined: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.joined is None else self.joined.nbytes


_by_cos: PerTensorMemo[Pair] = PerTensorMemo(
    "cos and sin side by side, by cos", 256, nbytes=1 << 28
)
_by_sin: PerTensorMemo[Pair] = PerTensorMemo(
    "cos and sin side by side, by sin", 256, nbytes=1 << 28
)


def keep(cos: Tensor, sin: Tensor) -> None:
    """Let these be put side by side once: tables that an embedding has made for itself.

    Not those of a caller, who may write to them in ways that move no version: torch_npu's
    `torch._foreach_*_` do not, by which moving averages and optimizers write.
    """
    if type(cos) is not Tensor or cos.device.type != "npu" or torch.compiler.is_compiling():
        return
    if cos.nbytes <= MOST_BYTES and kept(cos, sin) is None:
        _tell(cos, sin, Pair())


def kept(cos: Tensor, sin: Tensor) -> Pair | None:
    """What is known of tables that were to be kept, as long as both are what they were."""
    pair = _by_cos.known(cos)
    return pair if pair is not None and pair is _by_sin.known(sin) else None


def side_by_side(pair: Pair, cos: Tensor, sin: Tensor) -> Tensor:
    """[cos, sin] of a pair."""
    if pair.joined is None:
        pair = Pair(_joined(cos, sin))
        _tell(cos, sin, pair)
    assert pair.joined is not None
    return pair.joined


def _tell(cos: Tensor, sin: Tensor, pair: Pair) -> None:
    _by_cos.tell(cos, pair)
    _by_sin.tell(sin, pair)


def _joined(cos: Tensor, sin: Tensor) -> Tensor:
    from torch_npu.npu import current_stream

    # it outlives this call
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat((cos, sin), dim=-1)
    # the next to read it may be another stream
    current_stream(cos.device).synchronize()
    return joined


def _forward(problem: Lookup, xs: tuple[Tensor, ...], tables: Tables, rows: Tensor) -> list[Tensor]:
    """New tensors; xs are (*tokens, *heads, headdim), rows (tokens,)."""
    import torch_npu

    flat = [_readable(x.reshape(len(rows), -1)) for x in xs]
    if len(flat) == 1:
        # the operator takes two tensors: a head of the one is turned twice, and not kept
        flat.append(_readable(flat[0][:, : problem.headdim]))
    turned = torch_npu.npu_mrope(
        rows,
        *flat,
        tables.joined,
        problem.headdim,
        # what torch_npu itself puts for None is a list that is gone when it is read
        mrope_section=[0, 0, 0],
        rotary_mode="interleave" if problem.interleaved else "half",
    )
    # what an autograd.Function returns must be no view, else nobody may write to it
    return [
        torch.ops.aten._unsafe_view.default(out, x.shape)
        for out, x in zip(turned, xs, strict=False)
    ]


def _readable(flat: Tensor) -> Tensor:
    """(tokens, heads * headdim): where it lies, if the kernel can read it there."""
    apart, rest = divmod((flat.stride(0) - flat.shape[1]) * flat.element_size(), BLOCK_BYTES)
    spaced = flat.shape[0] == 1 or (rest == 0 and 0 <= apart <= MOST_BLOCKS_APART)
    if flat.stride(1) == 1 and flat.data_ptr() % BLOCK_BYTES == 0 and spaced:
        return flat
    return flat.clone(memory_format=torch.contiguous_format)


LOOKUP = Kernel(_forward, at_once=AT_ONCE)

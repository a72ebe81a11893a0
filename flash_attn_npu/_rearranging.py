"""`rearrange` for the machines without einops: clients import it from `flash_attn.bert_padding`.

Upstream has einops as a dependency, this package does not. Only rearranging is here; the notation
is that of einops: names, groups in parentheses, one ellipsis, and 1 for an axis of length 1.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from ._core.ground.arguments import require_tensors
from .errors import ArgumentError

__all__ = ["rearrange"]

Groups = list[tuple[str, ...]]

_SIDE = re.compile(r"\s*(?:(?:\(\s*(?:\w+\s*)*\)|\w+|\.\.\.)\s*)*")
_GROUP = re.compile(r"\([^)]*\)|\w+|\.\.\.")


def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
    """The axes of tensor split, moved and merged, e.g. by "b s h d -> (b s) h d".

    Args:
        tensor: any tensor.
        pattern: its axes, "->", and the axes of the result. Each name stands once on each side.
        axes_lengths: lengths of named axes, where a group on the left does not tell them.

    Returns:
        A view of tensor if possible, else a copy.

    Raises:
        ArgumentError: the pattern cannot be read, or does not fit the tensor.
        ArgumentTypeError: tensor is none.

    Contract: einops 0.8, `rearrange`, of one tensor.
    """
    require_tensors(tensor=tensor)
    left, right = _sides(pattern)
    left, right = (_with_ellipsis(side, left, tensor, pattern) for side in (left, right))
    _check_names(left, pattern, axes_lengths)
    lengths = _lengths(left, tensor, pattern, axes_lengths)
    names = [name for group in left for name in group]
    wanted = [name for group in right for name in group]
    if sorted(names) != sorted(wanted) or len(set(names)) != len(names):
        raise _unfit(pattern, "the same names once on each side of ->")
    split = tensor.reshape([lengths[name] for name in names])
    moved = split.permute([names.index(name) for name in wanted])
    return moved.reshape([math.prod(lengths[name] for name in group) for group in right])


def _sides(pattern: str) -> tuple[Groups, Groups]:
    sides = pattern.split("->")
    if len(sides) != 2 or not all(_SIDE.fullmatch(side) for side in sides):
        raise _unfit(pattern, "names, groups in parentheses and ..., around one ->")
    left, right = ([_names(group) for group in _GROUP.findall(side)] for side in sides)
    return left, right


def _names(group: str) -> tuple[str, ...]:
    return tuple(name for name in group.strip("()").split() if name != "1")


def _with_ellipsis(side: Groups, left: Groups, tensor: Tensor, pattern: str) -> Groups:
    """The side, with a name for each axis that ... stands for."""
    whole = ("...",)
    hidden = tensor.dim() - len([group for group in left if group != whole])
    if hidden < 0 or left.count(whole) > 1 or (whole not in left and (hidden or whole in side)):
        raise _unfit(pattern, f"one entry on the left for each of {tensor.dim()} axes")
    if whole not in side:
        return side
    place = side.index(whole)
    return side[:place] + [(f"...{i}",) for i in range(hidden)] + side[place + 1 :]


def _check_names(left: Groups, pattern: str, axes_lengths: dict[str, int]) -> None:
    names = {name for group in left for name in group}
    if any(name.isdigit() for name in names) or not names.issuperset(axes_lengths):
        raise _unfit(pattern, "names, no number but 1, and a length only for a name on the left")


def _lengths(
    left: Groups, tensor: Tensor, pattern: str, axes_lengths: dict[str, int]
) -> dict[str, int]:
    lengths = dict(axes_lengths)
    for group, length in zip(left, tensor.shape, strict=True):
        unknown = [name for name in group if name not in lengths]
        known = math.prod(lengths[name] for name in group if name in lengths)
        if len(unknown) == 1 and known and length % known == 0:
            lengths[unknown[0]] = length // known
        elif unknown or known != length:
            raise _unfit(pattern, f"groups whose lengths multiply to those of {list(tensor.shape)}")
    return lengths


def _unfit(pattern: str, allowed: str) -> ArgumentError:
    return ArgumentError(
        "pattern", repr(pattern), allowed, "correct it, or pass the length of an axis"
    )

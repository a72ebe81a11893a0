"""What makes an attention problem the kind it is, besides the rows of the table."""

from __future__ import annotations

from collections.abc import Iterator

from ..problems.attention import Problem, default_scale

__all__ = ["traits"]

REACHES = (16, 128, 512, 2048)
"""Lengths above which a kernel may go another way: its tiles, and the side of its mask."""

TILE = 128


def traits(problem: Problem) -> tuple[str, ...]:
    """Plain words, each of which has a witness in the sample of the problem."""
    return tuple(_all(problem))


def _all(problem: Problem) -> Iterator[str]:
    pairs = [pair for pair in problem.sequences if pair[0]]
    longest_q = max((pair[0] for pair in pairs), default=0)
    longest_k = max((pair[1] for pair in pairs), default=0)
    yield f"queries {_reach(longest_q)}"
    yield f"keys {_reach(longest_k)}"
    for side, name in enumerate(("queries", "keys")):
        if all(pair[side] % TILE == 0 for pair in pairs):
            yield f"{name} in whole tiles"
    yield from (word for word, found in _relations(pairs) if found)
    if problem.many_singles and all(_spared(problem, *pair) for pair in pairs):
        yield "nothing but single tokens"
    if problem.batch > 1:
        yield "several sequences"
    if problem.nheads_k == 1:
        yield "one key head"
    if problem.headdim_v != problem.headdim:
        yield f"headdim {problem.headdim_v} of v"
    if problem.softmax_scale == 1.0:
        yield "softmax_scale 1"
    elif problem.softmax_scale != default_scale(problem.headdim):
        yield "softmax_scale of its own"
    # what would stay hidden if two arguments were exchanged
    if problem.dropout_p == 0.5:
        yield "dropout_p 0.5"
    if problem.left is not None and problem.left == problem.right:
        yield "as much left as right"
    if problem.left is not None:
        yield f"left {_cut(longest_k - 1 - problem.left)}"
    if problem.right is not None:
        yield f"right {_cut(longest_q - 1 - problem.right)}"
    if problem.ask.alibi_slopes is not None and len(problem.ask.alibi_slopes.shape) == 2:
        yield "alibi_slopes of each sequence"
    pages = problem.pages
    if pages is not None and pages.size is not None:
        yield f"pages of {pages.size}"
        if longest_k > pages.size:
            yield "several pages"


def _spared(problem: Problem, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether the kernel is not given such sequences."""
    return seqlen_q == seqlen_k == 1 or problem.blind(seqlen_q, seqlen_k) == seqlen_q


def _reach(length: int) -> str:
    return next((f"up to {reach}" for reach in REACHES if length <= reach), f"above {REACHES[-1]}")


def _relations(pairs: list[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    yield "seqlen_q < seqlen_k", any(q < k for q, k in pairs)
    yield "seqlen_q > seqlen_k", any(q > k for q, k in pairs)


def _cut(hidden: int) -> str:
    """What a side of the window does to the row that it cuts most."""
    return (
        "hides nothing" if hidden < 0 else "touches the last key" if hidden == 0 else "hides keys"
    )

"""Operators that move keys and values into a cache and out of it, tried before they are believed.

What is written in a wrong place may be lost for good. So before the first call of a kind the
operator is rehearsed in a small cache of its own, which has to hold the same bits afterwards as one
that torch wrote; behind that call some of its own positions are compared too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.kernel import Kernel
from ..problems.cache import Cache, Span
from ..problems.places import positions
from ..problems.transfer import MANY_TOKENS, Append, Gather
from .judging import Finding
from .kinds import Case, Check, Kind, busy, watched, watching
from .trying import tried

__all__ = ["CHECK"]

LARGEST_PAGE = 1 << 20
"""Bytes; a page of a rehearsal is no larger, as a row of an unpaged cache may be."""

MOST_ROWS = 64


def _watched(case: Case, kernel: Kernel) -> tuple[Kernel, tuple[str, ...]]:
    kind = _kind(case)
    watch = _Append if isinstance(case.problem, Append) else _Gather

    def wrapped() -> Kernel:
        return kernel._replace(forward=watch(case, kernel, kind).forward)

    return watched(case, kernel, (kind,), wrapped)


def _kind(case: Case) -> Kind:
    problem = case.problem
    traits = [f"positions of {problem.token_bytes} bytes"]
    if isinstance(problem, Append) and problem.many:
        traits.append(f"{MANY_TOKENS} and more")
    dtype = str(problem.dtype).removeprefix("torch.")
    return Kind(case.name, "forward", dtype, 0, case.rows, tuple(traits))


class _Watch:
    """What both have in common."""

    def __init__(self, case: Case, kernel: Kernel, kind: Kind) -> None:
        self.case, self.kernel, self.kind = case, kernel, kind

    def idle(self, tensor: Tensor) -> bool:
        return busy(tensor) or not watching(self.kind, self.case.problem)


class _Append(_Watch):
    def forward(
        self, problem: Append, cache: Cache, spans: Sequence[Span], k: Tensor, v: Tensor
    ) -> None:
        if self.idle(k):
            self.kernel.forward(problem, cache, spans, k, v)
            return

        def look() -> tuple[None, list[Finding]]:
            stage = _Stage(cache, MANY_TOKENS // 2 if problem.many else 1)
            self.kernel.forward(problem, stage.cache, stage.spans, stage.k, stage.v)
            found = stage.written()
            if all(finding.agrees for finding in found):
                self.kernel.forward(problem, cache, spans, k, v)
                found += _looked_up(cache, spans, (k, v))
            return None, found

        # what was written already is written again
        tried(
            self.case,
            self.kind,
            look,
            lambda: self.case.instead().forward(problem, cache, spans, k, v),
        )


class _Gather(_Watch):
    def forward(
        self, problem: Gather, cache: Cache, spans: Sequence[Span]
    ) -> tuple[Tensor, Tensor]:
        if self.idle(cache.k):
            idle: tuple[Tensor, Tensor] = self.kernel.forward(problem, cache, spans)
            return idle

        def look() -> tuple[tuple[Tensor, Tensor], list[Finding]]:
            answer: tuple[Tensor, Tensor] = self.kernel.forward(problem, cache, spans)
            stage = _Stage(cache, 1)
            there = [Span(0, span.end) for span in stage.spans]
            found = stage.read(self.kernel.forward(problem, stage.cache, there), there)
            return answer, found + _looked_up(cache, spans, answer)

        def instead() -> tuple[Tensor, Tensor]:
            copies: tuple[Tensor, Tensor] = self.case.instead().forward(problem, cache, spans)
            return copies

        return tried(self.case, self.kind, look, instead)


class _Stage:
    """A small cache, laid out as the one of the call, and tokens for it; no number twice in a row.

    cache: of three sequences, in pages that do not lie in order.
    spans: across the end of a page, from the first position on, and up to the last.
    """

    def __init__(self, like: Cache, tokens: int) -> None:
        heads, headdim = like.k.shape[2:]
        device, dtype = like.k.device, like.k.dtype
        largest = LARGEST_PAGE // (heads * headdim * like.k.element_size())
        page = min(like.page, max(largest, 1))
        width = 1 + -(-2 * tokens // page)
        order = torch.arange(3 * width, dtype=torch.int32, device="cpu").flip(0)
        table = order.view(width, 3).t().contiguous()
        shape = (3 * width + 1, page, heads, headdim)
        self.before = [_numbers(shape, dtype, start).to(device) for start in (2.0, 3.0)]
        k, v = (x.clone() for x in self.before)
        self.cache, last = Cache(k, v, 3, table, None), width * page
        first = min(max(page - 1, 0), last - 2 * tokens)
        ends = (first, 0, last - 2 * tokens)
        self.spans = [Span(start, start + 2 * tokens) for start in ends]
        new = (6 * tokens, heads, headdim)
        self.k, self.v = (_numbers(new, dtype, start).to(device) for start in (5.0, 6.0))

    def written(self) -> list[Finding]:
        """How many numbers are not what torch writes."""
        exact = self._cache()
        exact.write(self.spans, self.k, self.v)
        pairs = ((self.cache.k, exact.k), (self.cache.v, exact.v))
        return [_differing(name, *pair) for name, pair in zip(_NAMES, pairs, strict=True)]

    def read(self, answer: tuple[Tensor, Tensor], spans: Sequence[Span]) -> list[Finding]:
        """How many numbers are not what torch reads."""
        exact = self._cache().gather(spans)
        pairs = zip(_NAMES, answer, exact, strict=True)
        return [_differing(name, one, other) for name, one, other in pairs]

    def _cache(self) -> Cache:
        k, v = self.before
        return Cache(k, v, 3, self.cache.block_table, None)


_NAMES = ("k_cache", "v_cache")


def _numbers(shape: Sequence[int], dtype: torch.dtype, start: float) -> Tensor:
    """Numbers of many bits, none of which is another's neighbour."""
    count = torch.Size(shape).numel()
    steps = torch.arange(count, dtype=torch.float32, device="cpu")
    return (start + torch.sin(steps * 1.3 + start) / 3).to(dtype).view(*shape)


def _looked_up(cache: Cache, spans: Sequence[Span], packed: tuple[Tensor, Tensor]) -> list[Finding]:
    """Some positions of the cache beside the packed tokens that belong there."""
    page, place = positions(cache.layout, spans, cache.k.device)
    total = len(page)
    some = torch.linspace(0, total - 1, min(total, MOST_ROWS), device="cpu").long()
    rows = some.to(page.device)
    where = (page[rows], place[rows])
    caches = zip(_NAMES, (cache.k, cache.v), packed, strict=True)
    return [_differing(name, held[where], tokens[rows]) for name, held, tokens in caches]


def _differing(name: str, one: Tensor, other: Tensor) -> Finding:
    """The numbers that are not the same bits, counted."""
    bits = [x.detach().contiguous().view(torch.uint8).cpu() for x in (one, other)]
    wrong = (bits[0] != bits[1]).sum().item()
    return Finding(f"{name}, in bytes,", float(wrong), 0.0, f"{bits[0].numel()} that were compared")


CHECK = Check(lambda case: (_kind(case),), _watched)

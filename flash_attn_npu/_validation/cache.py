"""Questions to flash_attn_with_kvcache, and to flash_attn_varlen_func over pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import flash_attn_interface as interface
from .._core.attention import cache_operators
from .._core.attention.decode import CacheCall
from .truth import Given, judged, solve

__all__ = ["CacheQuestion"]

Figures = dict[str, dict[str, float]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CacheQuestion:
    """One call over a cache of keys, which new ones may be appended to.

    page: 0 for a cache of one row for each sequence.
    indexed: rows of an unpaged cache are named by cache_batch_idx, in another order.
    strided: k_cache and v_cache are halves of one tensor.
    varlen: through flash_attn_varlen_func, the sequences' queries of unequal number.
    sink: the dtype of one logit more for each head, which is asked for as transformers does.
    lse: softmax_lse is asked for.
    """

    seqlens: tuple[int, ...] = (45, 70)
    rows: int = 1
    heads: tuple[int, int] = (4, 2)
    headdim: int = 64
    dtype: torch.dtype = torch.float16
    page: int = 32
    new: int = 0
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    leftpad: tuple[int, ...] = ()
    indexed: bool = False
    strided: bool = False
    shared: bool = False
    varlen: bool = False
    sink: torch.dtype | None = None
    lse: bool = True

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth; the cache itself is compared too."""
        q, k, v, new_k, new_v = self.tensors()
        rows = self.lay(k, device), self.lay(v, device)
        new = (new_k.to(device), new_v.to(device)) if self.new else None
        out, lse = self.call(q.to(device), rows, new)
        found_k = self._found(rows[0]) if self.new else []
        figures: Figures = {}
        for place, length in enumerate(self.seqlens):
            own_lse = None if lse is None else lse[place]
            keys, values = (
                torch.cat((old[place, :length], fresh[place]))
                for old, fresh in ((k, new_k), (v, new_v))
            )
            pad = self.leftpad[place] if self.leftpad else 0
            figure = self._judged((q[place], keys[pad:], values[pad:]), out[place], own_lse)
            if self.new:
                # what was appended is copied, not computed
                lost = (found_k[place][: length + self.new].double() - keys.double()).abs().max()
                figure["cache"] = {"error": lost.item(), "allowed": 0.0}
            for name, one in figure.items():
                figures[name] = max(one, figures.get(name, one), key=_excess)
        return figures

    def call(self, q: Tensor, cache: Pair, new: Pair | None = None) -> Any:
        """(out of each sequence, softmax_lse of each or None)."""
        device = q.device
        table = self._table(device) if self.page else None
        if self.varlen:
            return self._varlen(q, *cache, table)
        options: dict[str, Any] = {"causal": self.causal, "window_size": self.window}
        if self.leftpad:
            options["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32, device=device)
        if self.indexed:
            order = torch.arange(len(self.seqlens) - 1, -1, -1, dtype=torch.int32, device=device)
            options["cache_batch_idx"] = order
        options |= {
            "k": None if new is None else new[0],
            "v": None if new is None else new[1],
            "cache_seqlens": torch.tensor(self.seqlens, dtype=torch.int32, device=device),
            "block_table": table,
            "return_softmax_lse": self.lse,
        }
        sink = self._sinks()
        if sink is not None:
            return cache_operators.attend(CacheCall(q, *cache, sink=sink.to(device), **options))
        answer: Any = interface.flash_attn_with_kvcache(q, *cache, **options)
        return answer if self.lse else (answer, None)

    def _sinks(self) -> Tensor | None:
        if self.sink is None:
            return None
        return torch.linspace(-1.0, 2.0, self.heads[0]).to(self.sink)

    def again(self, device: torch.device) -> Any:
        """A function that asks once more without comparing, for the clock."""
        q, k, v, new_k, new_v = self.tensors()
        rows = self.lay(k, device), self.lay(v, device)
        new = (new_k.to(device), new_v.to(device)) if self.new else None
        there = q.to(device)
        return lambda: self.call(there, rows, new)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Any:
        counts = [1 + place % self.rows for place in range(len(self.seqlens))]
        packed = torch.cat([q[place, -count:] for place, count in enumerate(counts)])
        ends_q, ends_k = (
            torch.tensor([0, *lengths], dtype=torch.int32, device=q.device).cumsum(0).int()
            for lengths in (counts, self.seqlens)
        )
        lengths = (ends_q, ends_k, max(counts), max(self.seqlens))
        answer: Any = interface.flash_attn_varlen_func(
            packed, k, v, *lengths, causal=self.causal, return_attn_probs=True, block_table=table
        )
        out, lse = answer[0].split(counts), answer[1].split(counts, dim=1)
        return out, lse

    def _judged(
        self, given: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor | None
    ) -> Figures:
        q, k, v = given
        q = q[-out.shape[0] :]
        left, right = (
            None if side < 0 or side >= self._longest() else side for side in self.window
        )
        if left is not None and right is None:
            right = self._longest()
        how = Given(self.headdim**-0.5, left, 0 if self.causal else right, sink=self._sinks())
        exact, plain = (
            solve(q.to(dtype), k.to(dtype), v.to(dtype), torch.zeros_like(q, dtype=dtype), how)
            for dtype in (torch.float64, self.dtype)
        )
        figures = {"out": judged(out, exact.out, plain.out)}
        if lse is not None:
            figures["softmax_lse"] = judged(lse, exact.lse, None)
        return figures

    def _longest(self) -> int:
        pages = -(-(max(self.seqlens) + self.new) // self.page) if self.page else 0
        return pages * self.page if self.page else max(self.seqlens) + self.new

    def tensors(self) -> tuple[Tensor, ...]:
        """q, the keys and values of each sequence, and new ones, on the host."""
        generator = torch.Generator().manual_seed(1 + sum(self.seqlens) + self.headdim)
        batch, (heads, heads_k) = len(self.seqlens), self.heads
        cached = (batch, self._longest(), heads_k)
        shapes = ((batch, self.rows, heads), cached, cached, *[(batch, self.new, heads_k)] * 2)
        drawn = [torch.randn(*s, self.headdim, generator=generator).to(self.dtype) for s in shapes]
        if self.shared:
            drawn[1:3] = [x[:1].expand_as(x).contiguous() for x in drawn[1:3]]
        return tuple(drawn)

    def _table(self, device: torch.device) -> Tensor:
        pages = self._longest() // self.page
        count = len(self.seqlens) * pages
        # back to front, so that pages in the order of the cache are wrong
        order = torch.arange(count - 1, -1, -1, dtype=torch.int32).view(len(self.seqlens), pages)
        return (order % pages if self.shared else order).to(device)

    def lay(self, rows: Tensor, device: torch.device) -> Tensor:
        """(batch, seqlen, nheads_k, headdim) as the cache that the call is given."""
        if self.page:
            pages = rows.view(-1, self.page, *rows.shape[2:])
            laid = pages[: rows.shape[1] // self.page] if self.shared else pages
            laid = laid.flip(0)
        else:
            laid = rows.flip(0) if self.indexed else rows
        if self.strided:
            return torch.stack((laid, laid), dim=2).to(device)[:, :, 0]
        return laid.clone().to(device)

    def _found(self, laid: Tensor) -> list[Tensor]:
        """What the cache holds of each sequence, on the host."""
        laid = laid.detach().cpu()
        if self.page:
            return [laid[pages.long()].flatten(0, 1) for pages in self._table(laid.device)]
        return list(laid.flip(0) if self.indexed else laid)


def _excess(figure: dict[str, float]) -> float:
    return figure["error"] - figure["allowed"]

"""Random attention problems for hypothesis, and the tensors a problem stands for.

A `Problem` is a small frozen description, so that a failure prints and shrinks well; its values
come from its seed. Rows of q, k and v beyond the last sequence hold NaN: nothing may read them.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

LONGEST = 40
HEADDIMS = (1, 8, 16, 24, 32, 40, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "sliced", "transposed")


@dataclass(frozen=True)
class Problem:
    """One call: `seqlens` are (query, key) lengths per sequence, layouts those of q, k and v."""

    seqlens: tuple[tuple[int, int], ...]
    nheads_k: int = 1
    group: int = 1
    headdim: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    tail_q: int = 0
    tail_k: int = 0
    # how far the max_seqlen_k argument exceeds the longest sequence
    slack_k: int = 0
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    seed: int = 0

    @property
    def nheads(self) -> int:
        return self.nheads_k * self.group

    @property
    def cu_seqlens_q(self) -> list[int]:
        return list(accumulate((q for q, _ in self.seqlens), initial=0))

    @property
    def cu_seqlens_k(self) -> list[int]:
        return list(accumulate((k for _, k in self.seqlens), initial=0))

    @property
    def max_seqlen_q(self) -> int:
        return max((q for q, _ in self.seqlens), default=0)

    @property
    def max_seqlen_k(self) -> int:
        return max((k for _, k in self.seqlens), default=0) + self.slack_k

    @property
    def options(self) -> dict:
        """The keyword arguments that every flash_attn function and the reference share."""
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
        }

    def packed(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v as [total, heads, headdim] in their layouts, and dout like q, contiguous."""
        total_q, total_k = self.cu_seqlens_q[-1], self.cu_seqlens_k[-1]
        shapes = (
            (total_q, self.tail_q, self.nheads),
            (total_k, self.tail_k, self.nheads_k),
            (total_k, self.tail_k, self.nheads_k),
        )
        generator = torch.Generator().manual_seed(self.seed)
        inputs = []
        for (rows, tail, heads), layout in zip(shapes, self.layouts, strict=True):
            values = torch.randn(rows + tail, heads, self.headdim, generator=generator)
            values[rows:] = float("nan")
            inputs.append(lay_out(values.to(self.dtype).to(device), layout))
        dout = torch.randn(inputs[0].shape, generator=generator).to(self.dtype).to(device)
        return (*inputs, dout)

    def dense(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same values as [batch, seqlen, heads, headdim]; all sequences must be alike."""
        ((seqlen_q, seqlen_k),) = set(self.seqlens)
        batch = len(self.seqlens)
        lengths = (seqlen_q, seqlen_k, seqlen_k, seqlen_q)
        return tuple(
            x.unflatten(0, (batch, seqlen))
            for x, seqlen in zip(self.packed(device), lengths, strict=True)
        )


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The values of [rows, heads, headdim] behind other strides, made on the tensor's own device.

    "expanded" repeats the first head with stride 0, as clients do for multi-query attention.
    """
    if layout == "sliced":
        rows, heads, headdim = values.shape
        bigger = values.new_full((rows + 2, heads + 1, headdim), float("nan"))
        view = bigger[1 : rows + 1, :heads]
        view.copy_(values)
        return view
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return values[:, :1].expand(values.shape)
    return values


def lengths(smallest: int = 0) -> st.SearchStrategy[int]:
    return st.integers(smallest, LONGEST)


def pairs() -> st.SearchStrategy[tuple[int, int]]:
    """(seqlen_q, seqlen_k): any, equal, a few queries only, or empty on one side or both."""
    return st.one_of(
        st.tuples(lengths(1), lengths(1)),
        equal_pairs(1),
        st.tuples(st.integers(1, 3), lengths(1)),
        lengths().flatmap(lambda n: st.sampled_from([(0, n), (n, 0), (0, 0)])),
    )


def equal_pairs(smallest: int = 0) -> st.SearchStrategy[tuple[int, int]]:
    """As many queries as keys, which the packed functions and self-attention have."""
    return lengths(smallest).map(lambda n: (n, n))


def windows() -> st.SearchStrategy[tuple[int, int]]:
    """Every kind of window, one kind as likely as another."""
    side = st.integers(0, LONGEST + 5)
    wide = st.integers(LONGEST + 1, 1000)
    unbounded = st.just(-1)
    return st.one_of(
        st.just((-1, -1)),
        st.just((0, 0)),
        st.tuples(side, unbounded),
        st.tuples(unbounded, side),
        st.tuples(side, side),
        st.tuples(wide, wide),
    )


def layouts() -> st.SearchStrategy[tuple[str, str, str]]:
    for_q = st.sampled_from(LAYOUTS)
    for_kv = st.sampled_from((*LAYOUTS, "expanded"))
    plain = st.just(("contiguous", "contiguous", "contiguous"))
    return plain | st.tuples(for_q, for_kv, for_kv)


@st.composite
def problems(
    draw: st.DrawFn,
    seqlens: st.SearchStrategy[tuple[tuple[int, int], ...]],
    tails: bool = False,
    **fixed: st.SearchStrategy,
) -> Problem:
    """Problems over the given sequences; `fixed` replaces the strategy of a field."""
    tail = st.sampled_from((0, 0, 1, 7)) if tails else st.just(0)
    fields = {
        "nheads_k": st.integers(1, 3),
        "group": st.integers(1, 4),
        "headdim": st.sampled_from(HEADDIMS),
        "dtype": st.sampled_from(DTYPES),
        "causal": st.booleans(),
        "window_size": windows(),
        "softmax_scale": st.none() | st.floats(0.01, 1.0),
        "tail_q": tail,
        "tail_k": tail,
        "slack_k": st.sampled_from((0, 0, 3)) if tails else st.just(0),
        "layouts": layouts(),
        "seed": st.integers(0, 2**31),
    }
    drawn = {name: draw(strategy) for name, strategy in (fields | fixed).items()}
    return Problem(seqlens=draw(seqlens), **drawn)


ANY_PAIR = pairs()


def ragged(pair: st.SearchStrategy[tuple[int, int]] = ANY_PAIR) -> st.SearchStrategy[tuple]:
    """One to four sequences, each of its own lengths."""
    return st.lists(pair, min_size=1, max_size=4).map(tuple)


def alike(pair: st.SearchStrategy[tuple[int, int]] = ANY_PAIR) -> st.SearchStrategy[tuple]:
    """One to four sequences of the same lengths."""
    return st.tuples(pair, st.integers(1, 4)).map(lambda drawn: (drawn[0],) * drawn[1])


def varlen_problems(**fixed: st.SearchStrategy) -> st.SearchStrategy[Problem]:
    """Ragged batches, sometimes with rows beyond the last sequence."""
    return problems(ragged(), tails=True, **fixed)


def dense_problems(**fixed: st.SearchStrategy) -> st.SearchStrategy[Problem]:
    """Batches of sequences that are all alike."""
    return problems(alike(), **fixed)

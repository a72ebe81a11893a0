"""Cache calls as small frozen descriptions: their tensors, running them, and judging the answer.

Positions of a cache that hold no key of a sequence are NaN, and so is what lies around a cache
that is a slice of a bigger buffer: none of it may be read or written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache, reporting
from tests.helpers import cache_reference, reference
from tests.helpers.paged_keys import GARBAGE

INFER = "npu_fused_infer_attention_score"


@dataclass(frozen=True)
class CacheProblem:
    """One call of flash_attn_with_kvcache.

    lengths: of the sequences before the new keys; None asks for the whole cache.
    seqlen_cache: positions of a row, or of a page where `max_blocks` is given.
    given: how the lengths are passed: "int", "cpu", "device" or "none".
    layout: of the caches: "contiguous", "interleaved" (halves of one buffer) or "sliced".
    rows: cache_batch_idx.
    shared: all sequences lie in the pages of the first.
    """

    lengths: tuple[int, ...]
    seqlen_cache: int = 16
    max_blocks: int | None = None
    seqlen_q: int = 1
    seqlen_new: int | None = None
    nheads_k: int = 1
    group: int = 1
    headdim: int = 64
    dtype: torch.dtype = torch.float16
    given: str = "device"
    layout: str = "contiguous"
    strided: bool = False
    rows: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    shared: bool = False
    rotary_dim: int = 0
    alibi: str = "none"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.seqlen_cache * (self.max_blocks or 1)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(length + (self.seqlen_new or 0) for length in self.lengths)

    def arguments(self) -> dict[str, Any]:
        """Every argument, its tensors on the host; `place` moves them."""
        draw = _Draw(self)
        found: dict[str, Any] = {"q": draw.tokens(self.seqlen_q, self.nheads_k * self.group)}
        if self.max_blocks is not None:
            found["block_table"] = draw.block_table()
        if self.rows is not None:
            found["cache_batch_idx"] = torch.tensor(self.rows, dtype=torch.int32)
        if self.leftpad is not None:
            found["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32)
        found["k_cache"], found["v_cache"] = draw.caches(found.get("block_table"))
        if self.seqlen_new is not None:
            found["k"], found["v"] = (draw.tokens(self.seqlen_new, self.nheads_k) for _ in "kv")
        if self.rotary_dim:
            found["rotary_cos"], found["rotary_sin"] = draw.tables()
        if self.alibi != "none":
            shape = (self.nheads_k * self.group,)
            shape = (self.batch, *shape) if self.alibi == "sequence" else shape
            found["alibi_slopes"] = torch.rand(shape, generator=draw.generator) / 4
        found["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.given == "int":
            found["cache_seqlens"] = self.lengths[0]
        elif self.given == "none":
            found["cache_seqlens"] = None
        return found | self.options


class _Draw:
    """Random tensors for one problem.

    Values lie on a grid of 1/64: products of two of them are exact in float32, so a rotation is
    rounded once in any arithmetic, and what is stored can be compared bit for bit.
    """

    def __init__(self, problem: CacheProblem) -> None:
        self.problem = problem
        self.generator = torch.Generator().manual_seed(problem.seed)

    def values(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return ((values * 64).round() / 64).to(self.problem.dtype)

    def tokens(self, seqlen: int, heads: int) -> Tensor:
        return self.values(self.problem.batch, seqlen, heads, self.problem.headdim)

    def block_table(self) -> Tensor:
        """Pages in random order, the same for all seeds; each used once unless they are shared."""
        problem = self.problem
        assert problem.max_blocks is not None
        order = torch.Generator().manual_seed(problem.max_blocks)
        blocks = torch.randperm(problem.batch * problem.max_blocks + 1, generator=order)
        table = blocks[: problem.batch * problem.max_blocks].view(problem.batch, -1).int()
        if problem.shared:
            table = table[:1].repeat(problem.batch, 1)
        for row, end in zip(table, problem.ends, strict=True):
            row[-(-end // problem.seqlen_cache) :] = GARBAGE
        return table

    def caches(self, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values where a sequence has keys, NaN everywhere else."""
        problem = self.problem
        if block_table is not None:
            count = problem.batch * (problem.max_blocks or 1) + 1
        else:
            count = max(problem.rows or (problem.batch - 1,)) + 2
        shape = (count, problem.seqlen_cache, problem.nheads_k, problem.headdim)
        used = torch.zeros(shape[:2], dtype=torch.bool)
        for i, length in enumerate(problem.lengths):
            for position in range(problem.leftpad[i] if problem.leftpad else 0, length):
                if block_table is not None:
                    page = block_table[i, position // problem.seqlen_cache]
                    used[page, position % problem.seqlen_cache] = True
                else:
                    used[problem.rows[i] if problem.rows else i, position] = True
        hidden = ~used[:, :, None, None]
        k, v = (self.values(*shape).masked_fill(hidden, float("nan")) for _ in "kv")
        return k, v

    def tables(self) -> tuple[Tensor, Tensor]:
        """As long as the cache, which is all that upstream asks for, unless more is rotated."""
        problem = self.problem
        moving = problem.options.get("causal", False) or "window_size" in problem.options
        reach = max(problem.seqlen_new or 0, problem.seqlen_q if moving else 1)
        rows = max(problem.capacity, max(problem.lengths) + reach)
        angles = torch.rand(rows, problem.rotary_dim // 2, generator=self.generator) * 6.3
        cos, sin = (((x * 64).round() / 64).to(problem.dtype) for x in (angles.cos(), angles.sin()))
        return cos, sin


def lay_out(k: Tensor, v: Tensor, layout: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """(the buffers to watch, k, v), k and v being views of the buffers, with copied values."""
    if layout == "interleaved":
        both = torch.stack((k, v), dim=2)
        return [both], both[:, :, 0], both[:, :, 1]
    if layout == "sliced":
        rows, seqlen, heads, headdim = k.shape
        buffers = [
            x.new_full((rows + 2, seqlen + 1, heads + 1, headdim), torch.nan) for x in (k, v)
        ]
        views = [x[1 : rows + 1, :seqlen, 1:] for x in buffers]
        for view, values in zip(views, (k, v), strict=True):
            view.copy_(values)
        return buffers, *views
    k, v = k.clone(), v.clone()
    return [k, v], k, v


def place(
    problem: CacheProblem, arguments: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments on the device, laid out as the problem says, and the buffers of the caches."""
    on_device = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    buffers, *caches = lay_out(on_device["k_cache"], on_device["v_cache"], problem.layout)
    on_device["k_cache"], on_device["v_cache"] = caches
    if problem.given == "cpu":
        on_device["cache_seqlens"] = arguments["cache_seqlens"]
    if problem.strided:
        for name in ("q", "k", "v"):
            if name in on_device:
                x = on_device[name]
                on_device[name] = torch.cat((x, torch.full_like(x, torch.nan)), 2)[
                    :, :, : x.shape[2]
                ]
    return on_device, buffers


def bits(x: Tensor) -> Tensor:
    """The memory of a tensor, so that NaN equals itself and 0 is not -0."""
    return x.cpu().contiguous().view(torch.uint8)


def assert_buffers(problem: CacheProblem, buffers: list[Tensor], k: Tensor, v: Tensor) -> None:
    """The caches, and everything around them, are bit for bit these two in their layout."""
    expected, *_ = lay_out(k, v, problem.layout)
    for buffer, other in zip(buffers, expected, strict=True):
        wrong = (bits(buffer) != bits(other)).nonzero()
        assert not len(wrong), f"cache differs first at {wrong[0].tolist()} of {len(wrong)} bytes"


def assert_answer(
    actual: Tensor | tuple[Tensor, Tensor], expected: cache_reference.Expected
) -> None:
    """out, and softmax_lse where it came, are the reference's, contiguous, in their dtypes."""
    out = actual[0] if isinstance(actual, tuple) else actual
    assert out.dtype == expected.plain.dtype
    assert out.is_contiguous()
    reference.assert_close_to_reference(out, expected.out, expected.plain, "out")
    if isinstance(actual, tuple):
        assert actual[1].is_contiguous()
        reference.assert_lse_close(actual[1], expected.softmax_lse)


def check(problem: CacheProblem, device: torch.device) -> cache_reference.Expected:
    """Run the call on the device and hold its answer and its caches to the reference."""
    arguments = problem.arguments()
    expected = cache_reference.solve(**arguments)
    placed, buffers = place(problem, arguments, device)
    actual = flash_attn_with_kvcache(**placed)
    assert isinstance(actual, tuple) == arguments.get("return_softmax_lse", False)
    assert_answer(actual, expected)
    assert_buffers(problem, buffers, expected.k_cache, expected.v_cache)
    return expected


def only_launch(problem: CacheProblem, device: torch.device) -> dict[str, Any]:
    """The arguments of the one launch of a call whose answer is right."""
    with virtual_ascend.record() as seen, reporting() as region:
        check(problem, device)
    (launch,) = [one for one in seen.launches if "attention" in one.name]
    assert launch.name == INFER
    (tally,) = [one for one in region.tallies if not one.function.endswith("(rotary)")]
    assert (tally.kernel, tally.reasons, tally.calls) == (INFER, (), 1)
    return launch.arguments

"""Ring attention from the low-level functions: blocks of keys, merged, and their backward.

As ring-flash-attention does it: each device holds a slice of every sequence and passes its keys
on, so queries meet one block of keys after the other: earlier ones whole, their own one causal,
later ones not at all. The backward of a block takes the merged out and lse.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_interface as interface
from tests.helpers import argument_harness as harness
from tests.helpers.argument_harness import Answer
from tests.helpers.strategies import Problem

RANKS = 3
DENSE = Problem(((12, 12),) * 2, nheads_k=2, group=2, headdim=16)
VARLEN = Problem(((6, 6), (12, 12), (3, 3)), nheads_k=2, group=2, headdim=16)
layouts = pytest.mark.parametrize(
    "problem",
    [DENSE, VARLEN, replace(DENSE, dtype=torch.float16), replace(VARLEN, dtype=torch.bfloat16)],
    ids=["dense", "varlen", "dense-float16", "varlen-bfloat16"],
)


class Ring:
    """One problem, and how its sequences are dealt out to the ranks."""

    def __init__(self, problem: Problem, device: torch.device, causal: bool, p: float = 0.0):
        self.varlen = len(set(problem.seqlens)) > 1
        self.tensors = problem.packed() if self.varlen else problem.dense()
        self.problem, self.device, self.causal, self.dropout_p = problem, device, causal, p
        lengths = torch.tensor([seqlen for seqlen, _ in problem.seqlens])
        alone = lengths if self.varlen else lengths[:1]
        place = torch.cat([torch.arange(n) * RANKS // n for n in alone.tolist()])
        self.rows = [(place == rank).nonzero().flatten() for rank in range(RANKS)]
        self.shares = (lengths // RANKS).tolist()
        ends = [0, *accumulate(self.shares)]
        self.cu_seqlens = harness.int32(ends).to(device)

    def slice(self, x: Tensor, rank: int) -> Tensor:
        """The rows of a rank, on the device."""
        return x.index_select(0 if self.varlen else 1, self.rows[rank]).to(self.device)

    def gather(self, parts: list[Tensor], dimension: int) -> Tensor:
        """The slices of all ranks at their places again, on the host."""
        order = torch.cat(self.rows).argsort()
        return torch.cat([x.cpu() for x in parts], dimension).index_select(dimension, order)

    def options(self, diagonal: bool) -> dict:
        lengths = {}
        if self.varlen:
            lengths = {f"cu_seqlens_{x}": self.cu_seqlens for x in "qk"}
            lengths |= {f"max_seqlen_{x}": max(self.shares) for x in "qk"}
        return lengths | {
            "dropout_p": self.dropout_p,
            "softmax_scale": self.problem.headdim**-0.5,
            "causal": self.causal and diagonal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def steps(self, rank: int) -> list[int]:
        """Whose keys the rank's queries meet."""
        return list(range(rank + 1 if self.causal else RANKS))

    def forward(self, rank: int) -> tuple[Tensor, Tensor, dict[int, tuple[Tensor, ...]]]:
        """out in the dtype of q and lse in float32, merged in float64, and each step's draw."""
        name = "_flash_attn_varlen_forward" if self.varlen else "_flash_attn_forward"
        q = self.slice(self.tensors[0], rank)
        outs, lses, draws = [], [], {}
        for step in self.steps(rank):
            k, v = (self.slice(x, step) for x in self.tensors[1:3])
            out, lse, *draws[step] = getattr(interface, name)(
                q, k, v, **self.options(step == rank), return_softmax=self.dropout_p > 0
            )
            outs.append(out.cpu().double())
            lses.append(lse.cpu().double())
        lse = torch.logsumexp(torch.stack(lses), 0)
        shares = (torch.exp(x - lse).transpose(-1, -2)[..., None] for x in lses)
        out = sum(x * share for x, share in zip(outs, shares, strict=True))
        return out.to(q.dtype).to(self.device), lse.float().to(self.device), draws

    def backward(self, rank: int, out: Tensor, lse: Tensor, draws: dict) -> list[tuple]:
        """(step, dq, dk, dv) for each block of keys."""
        name = "_flash_attn_varlen_backward" if self.varlen else "_flash_attn_backward"
        q, dout = (self.slice(self.tensors[i], rank) for i in (0, 3))
        parts = []
        for step in self.steps(rank):
            k, v = (self.slice(x, step) for x in self.tensors[1:3])
            grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
            getattr(interface, name)(
                *(dout, q, k, v, out, lse, *grads),
                **self.options(step == rank),
                deterministic=False,
                rng_state=draws[step][1],
            )
            parts.append((step, *(x.cpu().double() for x in grads)))
        return parts

    def solve(self) -> Answer:
        """Merged out and lse, and the summed gradients, of the whole sequences."""
        forwards = [self.forward(rank) for rank in range(RANKS)]
        dqs, dks, dvs = ([0.0] * RANKS for _ in range(3))
        for rank, merged in enumerate(forwards):
            for step, dq, dk, dv in self.backward(rank, *merged):
                dqs[rank], dks[step], dvs[step] = dqs[rank] + dq, dks[step] + dk, dvs[step] + dv
        self.draws = [draws for _, _, draws in forwards]
        rows = 0 if self.varlen else 1
        dtype = self.problem.dtype
        gradients = (self.gather(parts, rows).to(dtype) for parts in (dqs, dks, dvs))
        return {
            "out": self.gather([out for out, _, _ in forwards], rows),
            "softmax_lse": self.gather([lse for _, lse, _ in forwards], rows + 1),
            **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
        }

    def expected(self) -> dict[str, harness.Truth]:
        """The answer of one call over whole sequences."""
        name = "flash_attn_varlen_func" if self.varlen else "flash_attn_func"
        function = getattr(interface, name)
        call = harness.arguments_for(function, self.problem)
        call |= {"causal": self.causal, "max_seqlen_k": self.problem.max_seqlen_k}
        if self.dropout_p:
            call |= {"dropout_p": self.dropout_p, "dropout_mask": self.masks()}
        return harness.truth(function, call)

    def masks(self) -> list[Tensor]:
        """The masks of whole sequences, from those of the blocks; later blocks are hidden."""
        nheads = self.problem.nheads
        whole = [torch.ones(nheads, *pair, dtype=torch.bool) for pair in self.problem.seqlens]
        for rank, draws in enumerate(self.draws):
            for step, (s_dmask, _) in draws.items():
                kept = ~torch.signbit(s_dmask.cpu())
                for mask, square, share in zip(whole, kept, self.shares, strict=True):
                    rows, keys = (slice(x * share, (x + 1) * share) for x in (rank, step))
                    mask[:, rows, keys] = square[:, :share, :share]
        return whole


@layouts
@pytest.mark.parametrize("causal", [False, True])
def test_merged_blocks_are_the_whole(device, problem, causal):
    ring = Ring(problem, device, causal)
    with virtual_ascend.record() as seen:
        answer = ring.solve()
    harness.assert_right(answer, ring.expected())
    launches = [x.name for x in seen.launches if "fusion_attention" in x.name]
    blocks = sum(len(ring.steps(rank)) for rank in range(RANKS))
    names = ["npu_fusion_attention"] * blocks + ["npu_fusion_attention_grad"] * blocks
    assert launches == (names if device.type == "npu" else [])


@layouts
@pytest.mark.parametrize("causal", [False, True])
def test_merged_blocks_are_the_whole_under_dropout(device, problem, causal):
    ring = Ring(problem, device, causal, p=0.3)
    harness.assert_right(ring.solve(), ring.expected())

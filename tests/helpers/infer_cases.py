"""What the tests of the simulated inference attention share: calls of the operator on small tensors
and an independent restatement of it, one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Keeps = Callable[[int, int], bool]


def triangle() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the first version with statistics; tensors may come from the host."""
    import torch_npu

    given = {n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    given = {"softmax_lse_flag": True, "scale": 0.3, **given}
    q, k, v = (x.npu() for x in (q, k, v))
    return torch_npu.npu_fused_infer_attention_score(q, k, v, input_layout=layout, **given)


def packed(
    rows: Sequence[int],
    columns: Sequence[int],
    heads: tuple[int, int] = (2, 1),
    width: int = 64,
    **given: Any,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Random query, key and value of TND, and the arguments that go with them."""
    tensors = [random(sum(rows), heads[0], width)]
    tensors += [random(sum(columns), heads[1], width) for _ in "kv"]
    lengths = {
        "actual_seq_lengths": cumulative(rows),
        "actual_seq_lengths_kv": cumulative(columns),
        "num_heads": heads[0],
        "num_key_value_heads": heads[1],
    }
    return tensors, {**lengths, **given}


def cumulative(lengths: Sequence[int]) -> list[int]:
    return torch.tensor(lengths).cumsum(0).tolist()


def in_pages(
    tensor: torch.Tensor, lengths: Sequence[int], size: int, table: torch.Tensor, blocks: int
) -> torch.Tensor:
    """A cache [blocks, size, N, D] with packed tokens at the table's pages, NaN elsewhere."""
    cache = torch.full((blocks, size, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
    for index, piece in enumerate(tensor.split(list(lengths))):
        for position, token in enumerate(piece):
            cache[table[index, position // size], position % size] = token
    return cache


def by_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keeps: Keeps, scale: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention [S, N, D] of one sequence [S, N, D], and its logarithmic sums [S, N, 1]."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(rows, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((rows, heads, 1), torch.inf, dtype=torch.float64)
    for i in range(rows):
        chosen = [j for j in range(k.shape[0]) if keeps(i, j)]
        for head in range(heads if chosen else 0):
            keys, values = (x[chosen, head // group].double() for x in (k, v))
            weights = torch.exp(scale * keys @ q[i, head].double())
            out[i, head] = (weights[:, None] * values).sum(0) / weights.sum()
            lse[i, head] = weights.sum().log()
    return out, lse


def sequences_by_rows(
    tensors: Sequence[torch.Tensor],
    rows: list[int],
    columns: list[int],
    keeps: Callable[[int, int, int, int], bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """by_rows of packed sequences; keeps takes (i, j, Sq, Skv)."""
    q, k, v = tensors
    pieces = zip(rows, columns, q.split(rows), k.split(columns), v.split(columns), strict=True)
    results = [
        by_rows(q_i, k_i, v_i, lambda i, j, r=r, c=c: keeps(i, j, r, c))
        for r, c, q_i, k_i, v_i in pieces
    ]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-3) -> None:
    got, expected = got.cpu().double(), expected.double()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)

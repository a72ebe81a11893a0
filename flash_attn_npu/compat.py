"""compat_matrix.md, printed from the table by `python -m flash_attn_npu.compat`."""

from __future__ import annotations

from ._version import FLASH_ATTN_VERSION
from .attention.support import BLOCKWISE, FUSION, INFER, TABLE, Row

__all__ = ["matrix"]

_HEAD = f"""\
# Compatibility matrix

What each kernel does with each property of an attention problem. Printed from the table that
dispatch itself reads (`flash_attn_npu/attention/support.py`) by `python -m flash_attn_npu.compat`;
a test fails when this file differs, and another reaches every cell.

- **native**: the kernel takes it. **refused**: it does not, for the reason given.
- **fused**: on Ascend the call is one launch of `{FUSION}`, rows without keys and rows of no
  sequence being left out before it and filled in after it.
- **composed**: on Ascend the call is computed exactly from torch operations by `{BLOCKWISE}`, in
  memory linear in sequence length, with one logged reason. Off Ascend every call is.
- **gathered**: the keys are copied out of the cache for `{FUSION}`, with one logged reason.
- **impossible**: no kernel takes it, and the call raises `UnsupportedError`.

`{INFER}` is asked only where the keys lie in a cache. A call is fused only if every property it
has is native to the fused kernel. No Ascend machine has
confirmed any of this: it holds for the real torch_npu 2.13.0 over a simulated card.

The API level is that of flash-attention {FLASH_ATTN_VERSION}.
"""

_NOT_SERVED = """\
## Not served yet

| name | answer |
| --- | --- |
| `.ops` but `.triton.rotary`, `.losses`, `.modules`, `.utils`, `.models` | absent: no spec |

## Differences from flash-attention

| where | here |
| --- | --- |
| dtypes | float32 and float64 as well |
| headdim | any; upstream stops at 256 |
| `dropout_p` | other random bits than on a GPU; `torch.manual_seed` repeats them |
| `softcap` with `dropout_p` | computed; upstream refuses it |
| `rng_state` | on the host; a negative offset marks a mask drawn by the composed kernel |
| `softmax_lse`, causal with ALiBi | of the documented bias; upstream's may differ by slope * row |
| `cu_seqlens_*` | may also be a tensor on the host or a list, at no cost |
| `max_seqlen_*` below the longest sequence | refused; upstream skips the rest silently |
| `max_seqlen_*` as a tensor on the device | not read; the longest sequence counts instead |
| forward-mode derivatives | refused; upstream has none either |
| rows past the last sequence | zeros and +inf; upstream leaves them unwritten |

Not a difference, though it surprises: as in flash-attention, a side of the window at least as long
as seqlen_k (max_seqlen_k for packed sequences) is unlimited, and beside a limited side an unlimited
one counts seqlen_k. So with window_size (1, -1) and more than twice as many queries as keys, the
first queries see nothing.
"""


def matrix() -> str:
    """The whole file, as text."""
    rows = "\n".join(_row(row) for row in TABLE)
    head = (
        f"| a problem with | {FUSION} | {BLOCKWISE} | {INFER} | on Ascend |\n"
        "| --- | --- | --- | --- | --- |"
    )
    return f"{_HEAD}\n## Attention\n\n{head}\n{rows}\n\n{_NOT_SERVED}"


def outcome(row: Row) -> str:
    """What becomes, on Ascend, of a problem whose only unusual property is this one."""
    if row.name.startswith("keys in a cache"):
        return "fused" if row.infer.refusal is None else "gathered"
    if row.fusion.refusal is None:
        return "fused" if row.blockwise.refusal is None else "fused or impossible"
    return "composed" if row.blockwise.refusal is None else "impossible"


def _row(row: Row) -> str:
    cells = (
        cell.verdict if cell.refusal is None else f"{cell.verdict}: {cell.refusal}"
        for cell in (row.fusion, row.blockwise, row.infer)
    )
    return f"| {row.name} | {' | '.join(cells)} | {outcome(row)} |"


if __name__ == "__main__":
    print(matrix(), end="")

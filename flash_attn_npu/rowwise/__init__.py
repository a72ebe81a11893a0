"""Which fused operator serves a rotation, norm, gate or loss: all that is not attention.

Here and in attention the same three steps: `problem` describes a call without its tensors,
`support` is the table, `dispatch` asks it and applies the fallback policy. The arithmetic is in
`kernels`: `fused` calls torch_npu, the others are composed of torch operations.
"""

from __future__ import annotations

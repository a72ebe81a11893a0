# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What type checkers must refuse; each line says so, and one that is accepted is an error."""

from __future__ import annotations

import torch

import flash_attn_npu
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func

x = torch.randn(1, 4, 2, 8)

flash_attn_func(x, x, x, return_attn_probs=True).view(1)  # type: ignore[attr-defined]
flash_attn_func(x, x)  # type: ignore[call-overload]
flash_attn_func(x, x, x, window=(1, 1))  # type: ignore[call-overload]
flash_attn_varlen_func(x, x, x, "cu", "cu", 3, 3)  # type: ignore[arg-type]
flash_attn_npu.fallback("ignore")  # type: ignore[arg-type]
print(flash_attn_npu.flash_attention)  # type: ignore[attr-defined]

"""What the modules of `ops.layer_norm` and `ops.rms_norm` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DropoutAddNorm"]


class DropoutAddNorm(nn.Module):
    """Dropout, add and norm, with parameters of its own; dropout while training."""

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self._add_bias()
        self.reset_parameters()

    def _add_bias(self) -> None:
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def _function(self) -> Callable[..., Any]:
        """The function of the module's file, as it is now."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Ones, and zeros for a bias."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """z, or (z, s) with prenorm."""
        return self._function()(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )

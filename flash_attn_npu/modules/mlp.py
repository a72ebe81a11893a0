"""Mirror of `flash_attn.modules.mlp`: MLPs `fc1`, activation, `fc2`, plain and gated.

Over a process group `fc1` is column-parallel and `fc2` row-parallel; without one they run on one
process. `FusedMLP` and `ParallelFusedMLP` are those of `ops.fused_dense`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .._core.rowwise.gates import geglu
from ..errors import ArgumentError
from ..ops.activations import swiglu
from ..ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ColumnParallelLinear",
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
    "RowParallelLinear",
    "swiglu",
]

_Activation = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        hidden_features: 4 * in_features if None.
        out_features: in_features if None.
        activation: a function of one tensor.
        bias1, bias2: whether fc1 and fc2 have one.
        return_residual: return (out, x).

    Contract: flash-attention 2.8, `Mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: _Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """x (..., in_features) to (..., out_features), or (out, x)."""
        out = self.fc2(self.activation(self.fc1(x)))
        return (out, x) if self.return_residual else out


class ParallelMLP(nn.Module):
    """`Mlp` over a process group.

    Args:
        process_group: the ranks that share it; None for one process.
        sequence_parallel: whether x is gathered along its first dimension, and a rank returns its
            part of it; else x and the result are whole in every rank.
        others: as in `Mlp`; sizes are those of the whole layer.

    Contract: flash-attention 2.8, `ParallelMLP`, which refuses a process_group of None.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: _Activation = F.gelu,
        process_group: ProcessGroup | None = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.fc1 = ColumnParallelLinear(
            in_features, hidden, process_group, bias1, sequence_parallel, 1, device, dtype
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden, out, process_group, bias2, sequence_parallel, 1, device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)), where fc1 gives y and gate side by side.

    Args:
        hidden_features: the width of y and of gate; 8 / 3 * in_features if None. It is rounded
            up to multiple_of.
        out_features: in_features if None.
        activation: a function of one tensor; F.sigmoid is F.glu, and F.silu is `swiglu`.
        bias1, bias2: whether fc1 and fc2 have one.
        return_residual: return (out, x).

    Raises:
        ArgumentError: multiple_of is not positive.

    Contract: flash-attention 2.8, `GatedMlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: _Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _gated_width(in_features, hidden_features, multiple_of)
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """x (..., in_features) to (..., out_features), or (out, x)."""
        out = self.fc2(_gated(self.fc1(x), self.activation))
        return (out, x) if self.return_residual else out


class ParallelGatedMlp(nn.Module):
    """`GatedMlp` over a process group: each rank's fc1 gives its own y and gate side by side.

    Args:
        process_group: the ranks that share it; None for one process.
        sequence_parallel: whether x is gathered along its first dimension, and a rank returns its
            part of it; else x and the result are whole in every rank.
        others: as in `GatedMlp`; sizes are those of the whole layer.

    Raises:
        ArgumentError: multiple_of is not positive.

    Contract: flash-attention 2.8, `ParallelGatedMlp`. Wider: a width that the ranks cannot share
    evenly.
    """

    def __init__(
        self,
        in_features: int,
        process_group: ProcessGroup | None,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: _Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _gated_width(in_features, hidden_features, multiple_of)
        out = in_features if out_features is None else out_features
        # in twos, so that no rank gets a y without its gate
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden, process_group, bias1, sequence_parallel, 2, device, dtype
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden, out, process_group, bias2, sequence_parallel, 1, device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        out: Tensor = self.fc2(_gated(self.fc1(x), self.activation))
        return out


def _gated(both: Tensor, activation: _Activation) -> Tensor:
    """y * activation(gate) of (..., [y, gate])."""
    if activation is F.sigmoid:
        return F.glu(both, dim=-1)
    if activation is F.gelu:
        return geglu(both)
    y, gate = both.chunk(2, dim=-1)
    if activation is F.silu:
        return swiglu(gate, y)
    return y * activation(gate)


def _gated_width(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    if multiple_of < 1:
        raise ArgumentError("multiple_of", multiple_of, "at least 1", "leave multiple_of out")
    hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
    return -(-hidden // multiple_of) * multiple_of

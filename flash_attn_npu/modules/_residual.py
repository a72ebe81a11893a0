"""What the blocks of `modules.block` share: stochastic depth, marks, and checks of their parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._core.ground.arguments import named as came
from ..errors import ArgumentError, ArgumentTypeError

__all__ = ["StochasticDepth", "as_weight", "check_fusible", "mark_norms", "refuse"]


class StochasticDepth(nn.Module):
    """Drops a whole row of its input, with probability p, in training (arXiv:1603.09382).

    Rows lie along the first dimension. Those that are kept are scaled by 1 / (1 - p), so that the
    expectation stays. It has no parameters and saves nothing.

    Raises:
        ArgumentError: p is not between 0 and 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ArgumentError(
                "drop_path", p, "a probability, 0 to 1", "pass how often a row is dropped"
            )
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x, with rows dropped; x itself in evaluation."""
        if not self.training or self.p == 0.0:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1.0 - self.p)
        return x * (kept / (1.0 - self.p) if self.p < 1.0 else kept)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


def refuse(wrong: bool, argument: str, value: object, allowed: str, remedy: str) -> None:
    """Raise ArgumentError if wrong."""
    if wrong:
        raise ArgumentError(argument, came(value), allowed, remedy)


def as_weight(x: Tensor, norm: Any) -> Tensor:
    """x in the dtype of the norm's weight, if it has one."""
    weight = getattr(norm, "weight", None)
    return x if weight is None else x.to(dtype=weight.dtype)


def check_fusible(block: nn.Module, norms: tuple[type[nn.Module], ...]) -> None:
    """Raise ArgumentTypeError unless the norms and dropouts of the block are what can be fused."""
    known = " or ".join(kind.__name__ for kind in norms)
    for name, kinds, allowed in (
        ("norm", norms, f"{known}, with a weight and without dropout of its own"),
        ("dropout", (nn.Dropout,), "Dropout"),
    ):
        for part in (getattr(block, f"{name}{half}", None) for half in (1, 2)):
            plain = name == "dropout" or (
                getattr(part, "weight", None) is not None and getattr(part, "drop", None) is None
            )
            if part is not None and not (isinstance(part, kinds) and plain):
                raise ArgumentTypeError(
                    f"{name}_cls",
                    f"what makes a {type(part).__name__}, with fused_dropout_add_ln",
                    allowed,
                    "pass fused_dropout_add_ln=False",
                )


def mark_norms(block: nn.Module, sequence_parallel: bool, shared: bool) -> None:
    """Set on the norms' parameters what `utils.distributed` looks for."""
    for name in ("norm1", "norm2"):
        norm = getattr(block, name, None)
        for parameter in () if norm is None else norm.parameters():
            if sequence_parallel:
                parameter._sequence_parallel = True
            if shared:
                parameter._shared_params = True

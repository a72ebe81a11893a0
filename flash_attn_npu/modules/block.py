"""Mirror of `flash_attn.modules.block`: transformer blocks around any mixer and any MLP.

A block adds what its sublayers return to a residual stream. With fused_dropout_add_ln the dropout,
the addition and the norm are one call of `layer_norm_fn`; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.ground.arguments import require_tensors
from .._core.ground.dtypes import widened
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ._residual import StochasticDepth, as_weight, check_fusible, mark_norms, refuse
from .mha import MHA
from .mlp import Mlp

__all__ = ["MHA", "Block", "Mlp", "ParallelBlock", "RMSNorm", "layer_norm_fn"]

_Make = Callable[..., nn.Module]


class Block(nn.Module):
    """A mixer and an MLP, one after the other.

    Args:
        dim: size of the last dimension of hidden_states.
        mixer_cls, mlp_cls: called with dim; `MHA` with dim // 64 heads and `Mlp` with 4 * dim
            hidden features if None. An mlp_cls that makes nn.Identity leaves out the second half.
        norm_cls: called with dim. dropout_cls: called with the probability.
        prenorm: the norms stand before the sublayers, and a residual is handed from block to block;
            otherwise behind the additions.
        resid_dropout1, resid_dropout2: dropout before each addition.
        drop_path1, drop_path2: probability that an addition is left out for a row of the batch.
        fused_dropout_add_ln: `layer_norm_fn` does the dropout, the addition and the norm. The norms
            must be nn.LayerNorm or `RMSNorm`, the dropouts nn.Dropout.
        return_residual: mixer and mlp return (out, what to add it to); for prenorm=False.
        residual_in_fp32: the residual is float32 at least; needs prenorm.
        sequence_parallel: mark the norms' parameters for `allreduce_sequence_parallel_grad`.
        mark_shared_params: mark them for `sync_shared_params`.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that exclude each other.

    Contract: flash-attention 2.8, `Block`. Different: a fused block honours the
    zero_centered_weight of its `RMSNorm`, as the other one does.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: _Make | None = None,
        mlp_cls: _Make | None = None,
        norm_cls: _Make = nn.LayerNorm,
        dropout_cls: _Make = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        refuse(
            residual_in_fp32 and not prenorm,
            "residual_in_fp32",
            residual_in_fp32,
            "False without prenorm",
            "pass prenorm=True",
        )
        self.mixer, mlp = _sublayers(dim, mixer_cls, mlp_cls)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = mlp
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
        _finish(self, sequence_parallel, mark_shared_params)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: (batch, seqlen, dim), or (total, dim) where the mixer takes it.
            residual: what the block before returned; None in the first block, and for
                prenorm=False.
            mixer_subset: an index of the positions to go on with: an argument of the mixer, and
                the residual keeps these. With prenorm only.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            (hidden_states, residual), yet to be added; hidden_states alone for prenorm=False.

        Raises:
            ArgumentError: residual or mixer_subset with prenorm=False.

        Contract: flash-attention 2.8, `Block.forward`.
        """
        require_tensors(hidden_states=hidden_states)
        options = dict(mixer_kwargs or {})
        if not self.prenorm:
            for argument, value in (("residual", residual), ("mixer_subset", mixer_subset)):
                refuse(
                    value is not None,
                    argument,
                    value,
                    "None with prenorm=False",
                    f"leave {argument} out",
                )
            return self._postnorm(hidden_states, options)
        if mixer_subset is not None:
            options["mixer_subset"] = mixer_subset
        hidden, residual = self._enter(1, hidden_states, residual)
        hidden = self.mixer(hidden, **options)
        if mixer_subset is not None:
            residual = residual[:, mixer_subset]
        if not isinstance(self.mlp, nn.Identity):
            hidden, residual = self._enter(2, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache: see `MHA.allocate_inference_cache`.

        Contract: flash-attention 2.8, `Block.allocate_inference_cache`.
        """
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _parts(self, half: int) -> tuple[Any, Any, Any]:
        if half == 1:
            return self.dropout1, self.drop_path1, self.norm1
        return self.dropout2, self.drop_path2, self.norm2

    def _enter(self, half: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add hidden to the residual; returns its norm, and the sum."""
        dropout, drop_path, norm = self._parts(half)
        if self.fused_dropout_add_ln:
            return self._fused(half, hidden, residual, True)  # type: ignore[no-any-return]
        dropped = drop_path(dropout(hidden))
        total = dropped if residual is None else dropped + residual
        return norm(as_weight(total, norm)), widened(total) if self.residual_in_fp32 else total

    def _leave(self, half: int, out: Tensor, hidden: Tensor) -> Tensor:
        """The norm of out plus hidden."""
        dropout, drop_path, norm = self._parts(half)
        if self.fused_dropout_add_ln:
            return self._fused(half, out, hidden, False)  # type: ignore[no-any-return]
        normed: Tensor = norm(as_weight(drop_path(dropout(out)) + hidden, norm))
        return normed

    def _fused(self, half: int, hidden: Tensor, residual: Tensor | None, prenorm: bool) -> Any:
        dropout, drop_path, norm = self._parts(half)
        rows = None
        if self.training and drop_path.p > 0.0:
            rows = drop_path(hidden.new_ones(hidden.shape[:-1]))
        return layer_norm_fn(
            hidden,
            norm.weight,
            norm.bias,
            residual=residual,
            rowscale=rows,
            prenorm=prenorm,
            **_fused_options(self, norm, dropout),
        )

    def _postnorm(self, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        out = self.mixer(hidden, **options)
        if self.return_residual:
            out, hidden = out
        hidden = self._leave(1, out, hidden)
        if isinstance(self.mlp, nn.Identity):
            return hidden
        out = self.mlp(hidden)
        if self.return_residual:
            out, hidden = out
        return self._leave(2, out, hidden)


class ParallelBlock(nn.Module):
    """A mixer and an MLP beside each other, as in GPT-J, GPT-NeoX and Falcon.

    Args:
        tied_norm: mixer and mlp read the same norm, norm1; else mlp reads norm2 of the same sum.
        resid_dropout1, resid_dropout2: dropout of what the mixer and the mlp of the block before
            have returned.

    The other arguments are those of `Block`, whose residual is always the prenorm one.

    Raises:
        ArgumentTypeError: fused_dropout_add_ln with norms or dropouts of another kind.

    Contract: flash-attention 2.8, `ParallelBlock`. Different: where the two dropouts differ, a
    block that is fused honours both in training, by not fusing.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: _Make | None = None,
        mlp_cls: _Make | None = None,
        norm_cls: _Make = nn.LayerNorm,
        dropout_cls: _Make = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer, mlp = _sublayers(dim, mixer_cls, mlp_cls)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = mlp
        self.dropout2 = dropout_cls(resid_dropout2)
        if not self.tied_norm:
            self.norm2 = norm_cls(dim)
        _finish(self, sequence_parallel, mark_shared_params)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states1: (batch, seqlen, dim), what the mixer of the block before returned, or
                what enters the first block.
            hidden_states2: what the mlp of the block before returned; None in the first block.
            residual: what the block before returned; None in the first block.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            (hidden_states1, hidden_states2, residual), yet to be added.

        Contract: flash-attention 2.8, `ParallelBlock.forward`.
        """
        require_tensors(hidden_states1=hidden_states1)
        enter = self._fused if self._fuses() else self._composed
        first, second, residual = enter(hidden_states1, hidden_states2, residual)
        return self.mixer(first, **(mixer_kwargs or {})), self.mlp(second), residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache: see `MHA.allocate_inference_cache`.

        Contract: flash-attention 2.8, `ParallelBlock.allocate_inference_cache`.
        """
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _fuses(self) -> bool:
        if not (self.fused_dropout_add_ln and self.training):
            return self.fused_dropout_add_ln
        # layer_norm_fn takes one probability
        return bool(self.dropout1.p == self.dropout2.p)

    def _composed(
        self, first: Tensor, second: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What mixer and mlp read, and the sum."""
        total = self.dropout1(first)
        if residual is not None:
            total = residual + total
        if second is not None:
            total = total + self.dropout2(second)
        first = second = self.norm1(as_weight(total, self.norm1))
        if not self.tied_norm:
            second = self.norm2(as_weight(total, self.norm2))
        return first, second, widened(total) if self.residual_in_fp32 else total

    def _fused(
        self, first: Tensor, second: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm1: Any = self.norm1
        norm2: Any = None if self.tied_norm else self.norm2
        answer = layer_norm_fn(
            first,
            norm1.weight,
            norm1.bias,
            residual=residual,
            x1=second,
            weight1=None if norm2 is None else norm2.weight,
            bias1=None if norm2 is None else norm2.bias,
            prenorm=True,
            **_fused_options(self, norm1, self.dropout1),
        )
        return answer[0], answer[0 if norm2 is None else 1], answer[-1]


def _sublayers(
    dim: int, mixer_cls: _Make | None, mlp_cls: _Make | None
) -> tuple[nn.Module, nn.Module]:
    make_mixer = partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls
    make_mlp = partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls
    return make_mixer(dim), make_mlp(dim)


def _finish(block: Block | ParallelBlock, sequence_parallel: bool, shared: bool) -> None:
    if block.fused_dropout_add_ln:
        check_fusible(block, (nn.LayerNorm, RMSNorm))
    mark_norms(block, sequence_parallel, shared)


def _fused_options(block: Block | ParallelBlock, norm: Any, dropout: Any) -> dict[str, Any]:
    return {
        "eps": norm.eps,
        "dropout_p": dropout.p if block.training else 0.0,
        "residual_in_fp32": block.residual_in_fp32,
        "zero_centered_weight": getattr(norm, "zero_centered_weight", False),
        "is_rms_norm": isinstance(norm, RMSNorm),
    }

"""Mirror of `flash_attn.layers.rotary`: the functions of `_rotary_functions`, and the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._core.ground.dense_arguments import LARGEST, require_dense, whole
from .._core.ground.storage import require_writable
from .._core.rowwise.lookup import keep
from .._core.rowwise.positions import check_dense
from ..errors import ArgumentError, ArgumentTypeError, renamed
from ..ops.triton.rotary import apply_rotary
from ._rotary_checks import check_kv
from ._rotary_functions import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    _apply_rotary_emb_qkv,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "_apply_rotary_emb_qkv",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


class RotaryEmbedding(nn.Module):
    """Rotary embedding (arXiv:2104.09864) and xPos (arXiv:2212.10554), in place on qkv or q and kv.

    Args:
        dim: rotary_dim, at most headdim.
        base: pair i turns by position * base ** (-2 i / dim).
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of the two halves.
        scale_base: None, or xPos with this base (512 is usual): q is scaled up with its position
            and k down, around the middle of the tables.
        device: where the frequencies are made.

    Nothing is saved in its state_dict: `inv_freq` and `scale` (None without xPos) are buffers that
    do not persist. The tables `_cos_cached` and `_sin_cached` (`_cos_k_cached` and `_sin_k_cached`
    for k under xPos) are computed in float32, rounded to the dtype of qkv, and grow on demand.

    Raises:
        ArgumentError: dim is not a positive int.

    Contract: flash-attention 2.8, `RotaryEmbedding`.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dim = whole("dim", dim, 1)
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim), or
                (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with num_heads_q; with kv,
                q alone: (batch, seqlen, nheads, headdim).
            kv: (batch, seqlen, 2, nheads_k, headdim).
            seqlen_offset: position of the first token: an int, or (batch,) int32 or int64.
            max_seqlen: how many positions the tables must hold; from qkv, kv and an int
                seqlen_offset if None. A tensor of offsets does not make the tables grow.

        Returns:
            qkv, or (q, kv).

        Raises:
            ArgumentError: offsets in a tensor, and no tables yet; otherwise as `apply_rotary`.
        """
        require_dense(qkv=qkv)
        if qkv.dim() < 2:
            came = f"shape {tuple(qkv.shape)}"
            allowed = "(batch, seqlen, ...)"
            raise ArgumentError("qkv", came, allowed, "reshape qkv")
        seqlen = qkv.shape[1]
        if kv is not None:
            check_kv(kv)
            seqlen = max(seqlen, kv.shape[1])
        if max_seqlen is not None:
            max_seqlen = whole("max_seqlen", max_seqlen)
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            # a negative offset is refused below, by its positions
            reach = seqlen + max(whole("seqlen_offset", seqlen_offset, -LARGEST), 0)
            self._update_cos_sin_cache(reach, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if cos is None or sin is None:
            raise ArgumentError(
                "max_seqlen",
                "None, with seqlen_offset in a tensor and no tables yet",
                "the number of positions that seqlen_offset and qkv can reach",
                "pass max_seqlen",
            )
        try:
            if kv is None:
                return apply_rotary_emb_qkv_(
                    qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
                )
            cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
            # before q is written, so that a wrong kv has no effect
            require_writable(kv=kv)
            check_dense(kv[:, :, 0], cos_k, sin_k, seqlen_offset)
            q = apply_rotary_emb_func(qkv, cos, sin, self.interleaved, True, seqlen_offset)
            return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
        except (ArgumentError, ArgumentTypeError) as error:
            raise renamed(error, {"seqlen_offsets": "seqlen_offset", "x": "qkv"}) from None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponents

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor | None:
        if self.scale_base is None:
            return None
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (even + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables hold `seqlen` positions at least, on this device and in this dtype."""
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and (known.device, known.dtype) == (device, dtype)
        ):
            self._keep()
            return
        # tables made in inference mode could not be saved for a backward later
        with torch.inference_mode(False), torch.no_grad():
            self._compute_tables(seqlen, device, dtype)
        self._seq_len_cached = seqlen
        self._keep()

    def _keep(self) -> None:
        """Say again that nobody writes to the tables: what is known may have been forgotten."""
        for cos, sin in (
            (self._cos_cached, self._sin_cached),
            (self._cos_k_cached, self._sin_k_cached),
        ):
            if cos is not None and sin is not None:
                keep(cos, sin)

    def _compute_tables(
        self, seqlen: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        inv_freq, scale = self.inv_freq, self.scale
        # a module cast to half precision has rounded these, and far positions would be wrong
        if inv_freq.dtype != torch.float32:
            inv_freq, scale = self._compute_inv_freq(device), self._compute_scale(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        if scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = _rounded(cos, sin, dtype)
            return
        centred = (positions - seqlen // 2) / self.scale_base
        growth = scale.to(positions.device) ** centred[:, None]
        self._cos_cached, self._sin_cached = _rounded(cos * growth, sin * growth, dtype)
        self._cos_k_cached, self._sin_k_cached = _rounded(cos / growth, sin / growth, dtype)


def _rounded(cos: Tensor, sin: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return cos.to(dtype=dtype), sin.to(dtype=dtype)

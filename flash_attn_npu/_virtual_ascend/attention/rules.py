"""What a card's tiling code refuses of npu_fusion_attention and its gradient, and torch_npu does
not: read in the operators' sources, never tried on a card. Each message quotes its rule.
"""

from __future__ import annotations

from functools import cache

import torch

from ..machine.refusal import CardRefusal, require
from .call import AttentionCall, is_ascend_950
from .ranges import (
    check_dense_band,
    check_dense_band_backward,
    check_tnd,
    check_tnd_band_backward,
)

_DENSE = ("BSND", "BNSD", "BSH", "SBH")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_COMPRESSED = 2048


def check_forward(call: AttentionCall) -> None:
    """Everything refused in either direction, in the order a tiling would meet it."""
    require(call.layout in (*_DENSE, "TND"), f"input_layout {call.layout} does not exist")
    require(not call.has_rope, "query_rope and key_rope are not simulated")
    _check_dtypes(call)
    _check_heads(call)
    _check_keep_prob(call)
    if call.is_tnd:
        check_tnd(call)
    else:
        _check_dense_sizes(call)
    if call.mask is not None:
        _check_mask(call)
    if call.pse is not None:
        _check_pse(call)
    if call.sink is not None:
        _check_sink(call)
    if not call.is_tnd and call.mask is not None and call.mode in (0, 4):
        check_dense_band(call)


def check_backward(
    call: AttentionCall,
    dy: torch.Tensor,
    statistics: tuple[torch.Tensor, torch.Tensor],
    attention: torch.Tensor,
) -> None:
    """What the gradient refuses beyond the forward."""
    _check_like_output(call, dy, "dy")
    _check_like_output(call, attention, "attention_in")
    for name, tensor in zip(("softmax_max", "softmax_sum"), statistics, strict=True):
        _check_statistics(call, tensor, name)
    require(
        call.pse_type == 1 or call.pse is not None,
        "pse_type other than 1 without pse is an error in the gradient",
    )
    padded = call.is_tnd and sum(rows for rows, _ in call.lengths) < call.query.shape[0]
    require(
        not (padded and call.true_tnd_statistics),
        'softmax_layout "TND" with padding at the end: the gradient reads the wrong statistics',
    )
    if call.mask is None or call.mode not in (0, 4):
        return
    if call.is_tnd:
        check_tnd_band_backward(call)
    else:
        check_dense_band_backward(call)


def _check_dtypes(call: AttentionCall) -> None:
    dtype = call.query.dtype
    require(dtype in _DTYPES, f"query is {dtype}: only float16, bfloat16 and float32 exist")
    require(
        call.key.dtype == dtype and call.value.dtype == dtype,
        f"query, key and value need one dtype, got {dtype}, {call.key.dtype}, {call.value.dtype}",
    )


def _check_heads(call: AttentionCall) -> None:
    if "H" not in call.layout:
        heads = call.query.shape[call.layout.index("N")]
        require(call.heads == heads, f"head_num {call.heads} must equal query's N {heads}")
        value_heads = call.value.shape[call.layout.index("N")]
        require(value_heads == call.kv_heads, "key and value need the same N")
    else:
        require(
            call.heads > 0 and call.query.shape[-1] % call.heads == 0,
            f"head_num {call.heads} must divide query's H {call.query.shape[-1]}",
        )
    require(1 <= call.heads <= 256, f"N must be in 1..256, got {call.heads}")
    require(
        call.kv_heads > 0 and call.heads % call.kv_heads == 0,
        f"query's N {call.heads} must be a multiple of key's N {call.kv_heads}",
    )
    query, key, value = call.head_dims
    require(query == key, f"query's D {query} must equal key's D {key}")
    require(1 <= query <= 768, f"D must be in 1..768, got {query}")
    require(value <= key, f"value's D {value} must not exceed key's D {key}")


def _check_keep_prob(call: AttentionCall) -> None:
    require(0 < call.keep_prob <= 1, f"keep_prob must be in (0, 1], got {call.keep_prob}")


def _check_dense_sizes(call: AttentionCall) -> None:
    for axis in ("B", "S"):
        place = call.layout.index(axis)
        require(
            call.key.shape[place] == call.value.shape[place],
            f"key and value need the same {axis}",
        )
    place = call.layout.index("B")
    require(call.query.shape[place] == call.key.shape[place], "query and key need the same B")


@cache
def upper_triangle() -> torch.Tensor:
    ones = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.uint8, device="cpu")
    return ones.triu(diagonal=1)


def _check_mask(call: AttentionCall) -> None:
    mask = call.mask
    require(
        mask.dtype in (torch.bool, torch.uint8),
        f"atten_mask must be bool or uint8, got {mask.dtype}",
    )
    if call.mode not in range(9):
        raise CardRefusal(f"sparse_mode {call.mode} does not exist")
    require(call.mode <= 4, f"sparse_mode {call.mode} is not simulated")
    if call.mode in (0, 1):
        _check_full_mask(call)
        return
    shape = (_COMPRESSED, _COMPRESSED)
    require(
        mask.shape == shape,
        f"sparse_mode {call.mode} needs atten_mask of shape {shape}, got {tuple(mask.shape)}",
    )
    require(
        torch.equal(mask.to(torch.uint8), upper_triangle()),
        f"sparse_mode {call.mode} needs the upper triangle (diagonal 1) as atten_mask",
    )


def _check_full_mask(call: AttentionCall) -> None:
    shape = tuple(call.mask.shape)
    if call.is_tnd:
        rows, columns = zip(*call.lengths, strict=True)
        allowed = [(max(rows), max(columns)), (sum(rows), sum(columns))]
    else:
        batch, rows, columns = call.dense_sizes()
        inner = (rows, columns)
        allowed = [(batch, call.heads, *inner), (batch, 1, *inner), (1, 1, *inner), inner]
    require(
        shape in allowed,
        f"sparse_mode {call.mode} needs atten_mask of a shape in {allowed}, got {shape}",
    )


def _check_pse(call: AttentionCall) -> None:
    require(call.pse_type in (0, 1, 2, 3), f"pse_type {call.pse_type} does not exist")
    require(
        not call.is_tnd or all(rows and columns for rows, columns in call.lengths),
        "pse of any kind does not go with sequences of length zero",
    )
    if call.pse_type in (2, 3):
        _check_slopes(call)
        return
    require(
        call.pse.dtype == call.query.dtype,
        f"pse must have query's dtype {call.query.dtype}, got {call.pse.dtype}",
    )
    shape = tuple(call.pse.shape)
    if call.is_tnd:
        flat = (sum(r * c for r, c in call.lengths), sum(c for _, c in call.lengths))
        allowed = [(call.heads * size,) for size in flat]
    else:
        batch, rows, columns = call.dense_sizes()
        allowed = [
            (batch, call.heads, rows, columns),
            (1, call.heads, rows, columns),
            (batch, call.heads, 1, columns),
        ]
    require(
        shape in allowed,
        f"pse needs a shape in {allowed}, got {shape} (compressed forms are not simulated)",
    )


def _check_slopes(call: AttentionCall) -> None:
    pse = call.pse
    require(pse.dtype == torch.float32, f"inner pse must be float32 slopes, got {pse.dtype}")
    shapes = [(call.heads,), (len(call.lengths), call.heads)]
    require(
        tuple(pse.shape) in shapes, f"inner pse needs a shape in {shapes}, got {tuple(pse.shape)}"
    )
    # The two generations check the opposite layouts
    if call.is_tnd == is_ascend_950():
        require(
            all(rows == columns for rows, columns in call.lengths),
            "INNER Pse alibi is supported only when s1Size and s2Size are equal",
        )


def _check_sink(call: AttentionCall) -> None:
    sink = call.sink
    require(
        sink.dtype == torch.float32 and tuple(sink.shape) == (call.heads,),
        f"sink must be float32 [{call.heads}], got {sink.dtype} {tuple(sink.shape)}",
    )
    require(
        call.query.dtype in (torch.float16, torch.bfloat16),
        f"sink goes with float16 and bfloat16 only, got {call.query.dtype}",
    )


def _check_like_output(call: AttentionCall, tensor: torch.Tensor, name: str) -> None:
    width = call.head_dims[2] * (call.heads if "H" in call.layout else 1)
    shape = (*call.query.shape[:-1], width)
    require(
        tuple(tensor.shape) == shape and tensor.dtype == call.query.dtype,
        f"{name} must be {call.query.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}",
    )


def _check_statistics(call: AttentionCall, tensor: torch.Tensor, name: str) -> None:
    if call.is_tnd:
        shape = (call.query.shape[0], call.heads, 8)
    else:
        batch, rows, _ = call.dense_sizes()
        shape = (batch, call.heads, rows, 8)
    require(
        tensor.dtype == torch.float32 and tuple(tensor.shape) == shape,
        f"{name} must be float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}",
    )
    for view in call.split_statistics(tensor):
        require(
            torch.equal(view.nan_to_num(), view[..., :1].expand_as(view).nan_to_num()),
            f"{name} must hold each value eight times",
        )

"""What a card's tiling code refuses of npu_fused_infer_attention_score, and torch_npu does not:
read in the documents and sources, never tried on a card. Each message quotes its rule.

VIRTUAL_ASCEND_OLD_FIA=1 adds what earlier releases of CANN are documented or reported to refuse.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..attention.call import is_ascend_950
from ..attention.rules import upper_triangle
from ..machine.refusal import require
from .call import InferCall
from .pages import check_lengths, check_pages

_LAYOUTS = ("BSH", "BSND", "BNSD", "TND")
_DTYPES = (torch.float16, torch.bfloat16)
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
_COMPRESSED = (2048, 2048)
_NARROW_VALUES = (192, 192, 128)


def is_old() -> bool:
    return os.environ.get("VIRTUAL_ASCEND_OLD_FIA") == "1"


def is_empty(call: InferCall) -> bool:
    """Whether key and value hold nothing at all: the kernel then looks at no other argument."""
    return call.key.numel() == 0 and call.value.numel() == 0


def check(call: InferCall) -> None:
    """Everything refused, in the order a tiling would meet it."""
    require(not call.not_simulated, f"{', '.join(call.not_simulated)}: not simulated")
    require(call.layout in _LAYOUTS, f"input_layout {call.layout} is not simulated")
    _check_tensors(call)
    _check_heads(call)
    _check_sizes(call)
    check_lengths(call)
    if call.is_tnd:
        _check_packed_heads(call)
    else:
        _check_dense_heads(call)
    if call.is_paged:
        check_pages(call, is_old())
    _check_sparse_mode(call)
    if call.sink is not None:
        _check_sink(call, call.sink)


def _check_tensors(call: InferCall) -> None:
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    for name, tensor in tensors.items():
        # a cache may be a part of a greater one there
        blocks_apart = is_ascend_950() and call.is_paged and name != "query"
        lies = all(map(torch.Tensor.is_contiguous, tensor)) if blocks_apart else False
        require(lies or tensor.is_contiguous(), f"{name} must be contiguous")
    dtype = call.query.dtype
    require(dtype in _DTYPES, f"query is {dtype}: only float16 and bfloat16 exist")
    require(
        call.key.dtype == dtype and call.value.dtype == dtype,
        f"query, key and value need one dtype, got {dtype}, {call.key.dtype}, {call.value.dtype}",
    )
    dims = 3 if call.layout in ("BSH", "TND") else 4
    allowed = (3, 4) if call.is_paged else (dims,)
    require(
        call.key.dim() in allowed and call.value.dim() == call.key.dim(),
        f"key and value need {allowed} dimensions, got {call.key.dim()} and {call.value.dim()}"
        " (caches of 5 dimensions are not simulated)",
    )
    require(call.inner_precise in range(4), f"inner_precise {call.inner_precise} does not exist")


def _check_heads(call: InferCall) -> None:
    require(1 <= call.heads <= 256, f"N must be in 1..256, got {call.heads}")
    require(
        not (call.is_paged and call.key.dim() == 3 and call.given_kv_heads == 0),
        "num_key_value_heads 0 with a cache of 3 dimensions: the host divides by zero",
    )
    require(
        call.kv_heads > 0 and call.heads % call.kv_heads == 0,
        f"num_key_value_heads {call.kv_heads} must divide N {call.heads}",
    )
    require(
        not is_old() or call.heads // call.kv_heads <= 64,
        "at most 64 query heads for a key head (old CANN)",
    )
    if call.layout == "BSH":
        width = call.query.shape[-1]
        require(width % call.heads == 0, f"num_heads {call.heads} must divide H {width}")
    else:
        heads = call.query.shape[call.layout.index("N")]
        require(call.heads == heads, f"num_heads {call.heads} must equal query's N {heads}")
    if not call.is_paged:
        _check_kv_heads(call)


def _check_kv_heads(call: InferCall) -> None:
    for tensor in (call.key, call.value):
        if call.layout == "BSH":
            fits = tensor.shape[-1] % call.kv_heads == 0
        else:
            fits = tensor.shape[call.layout.index("N")] == call.kv_heads
        require(
            fits,
            f"num_key_value_heads {call.kv_heads} must be the N of key and value "
            f"{tuple(tensor.shape)}",
        )


def _check_sizes(call: InferCall) -> None:
    query, key, value = call.head_dims
    require(query == key, f"query's D {query} must equal key's D {key}")
    require(1 <= query <= 512, f"D must be in 1..512, got {query}")
    differ = call.is_tnd or (is_ascend_950() and call.layout in ("BSND", "BSH"))
    require(
        call.head_dims == _NARROW_VALUES if differ and key != value else key == value,
        f"key and value need one D, or 192 and 128 in TND (BSND and BSH on a 950), got {key} and "
        f"{value}",
    )
    places = [t.shape[:2] if t.dim() == 3 else t.shape[:3] for t in (call.key, call.value)]
    require(places[0] == places[1], "key and value need one shape, D apart")
    if call.is_tnd:
        return
    require(1 <= call.batch <= 65536, f"B must be in 1..65536, got {call.batch}")
    require(
        call.is_paged or call.key.shape[0] == call.batch,
        f"query and key need the same B, got {call.batch} and {call.key.shape[0]}",
    )


def _check_dense_heads(call: InferCall) -> None:
    width = call.head_dims[0]
    require(
        call.is_dense_decode or width % 16 == 0,
        f"more than one row needs D divisible by 16, got {width}",
    )
    require(
        width % 16 == 0 or width <= 128,
        f"D {width} not divisible by 16 must not exceed 128",
    )
    flat = max(call.heads, call.kv_heads) * width
    require(call.layout == "BNSD" or flat < 65536, f"{call.layout} needs N * D < 65536, got {flat}")


def _check_packed_heads(call: InferCall) -> None:
    dims = call.head_dims
    grouped = call.heads != call.kv_heads
    precise = (0, 1) if not grouped and call.query.dtype == torch.float16 else (0,)
    require(
        call.inner_precise in precise,
        f"TND here needs inner_precise in {precise}, got {call.inner_precise}",
    )
    require(dims[0] % 16 == 0, f"TND needs D divisible by 16, got {dims[0]}")
    listed = dims in ((64, 64, 64), (128, 128, 128), _NARROW_VALUES)
    if is_old():
        allowed = listed or dims == (192, 192, 192)
        require(allowed, f"TND needs D in 64, 128, 192 (old CANN), got {dims}")
    require(
        listed or call.takes_flash_path,
        f"TND needs D of 64, 128 or 192 with 128, or one D up to 256 and no cache of 4 "
        f"dimensions, got {dims}",
    )


def _check_sink(call: InferCall, sink: torch.Tensor) -> None:
    """The limits of torch_npu's document, which are narrower than those of CANN's newest.

    An A2 reads it as bfloat16 in some of its kernels, whatever its dtype.
    """
    require(call.is_tnd, f"learnable_sink needs TND or NTD_TND, got {call.layout}")
    dtypes = _DTYPES if is_ascend_950() else (torch.bfloat16,)
    require(
        sink.dtype in dtypes and sink.dtype == call.query.dtype,
        f"learnable_sink and query need one dtype of {dtypes}, got {sink.dtype} and "
        f"{call.query.dtype}",
    )
    require(
        tuple(sink.shape) == (call.heads,) and sink.is_contiguous(),
        f"learnable_sink must be contiguous, [{call.heads}], got {tuple(sink.shape)}",
    )
    query, _, value = call.head_dims
    require(
        query in (64, 128, 192) and value in (64, 128),
        f"learnable_sink needs D of 64, 128 or 192, and 64 or 128 of value, got {query} and "
        f"{value}",
    )
    require(
        call.inner_precise == 0,
        f"learnable_sink needs inner_precise 0, got {call.inner_precise}",
    )


def _check_sparse_mode(call: InferCall) -> None:
    require(call.mode in (0, 1, 2, 3, 4), f"sparse_mode {call.mode} is not simulated")
    if call.mask is not None:
        require(
            call.mask.dtype in _MASK_DTYPES,
            f"atten_mask must be bool, int8 or uint8, got {call.mask.dtype}",
        )
        require(call.mask.is_contiguous(), "atten_mask must be contiguous")
    if call.is_dense_decode:
        _check_decode_mask(call)
        return
    if call.is_tnd:
        _check_packed_mode(call)
    if call.mode in (2, 3, 4):
        _check_compressed(call)
        if call.mode == 4:
            _check_band(call)
    elif call.mask is not None or call.mode == 1:
        _check_matrix(call)


def _check_decode_mask(call: InferCall) -> None:
    """The sparse mode does not count, but a mask does: which one, no two sources agree on."""
    if call.mask is None:
        return
    require(
        call.mask.shape[-2:] == _COMPRESSED,
        "atten_mask that is not the compressed one, with one row: not simulated",
    )
    require(
        call.version == 1 or call.layout != "BSND",
        "the second version refuses the compressed atten_mask in BSND with one row",
    )


def _check_packed_mode(call: InferCall) -> None:
    require(call.mode in (0, 3, 4), f"TND needs sparse_mode 0, 3 or 4, got {call.mode}")
    require(call.mode != 0 or call.mask is None, "TND with sparse_mode 0 takes no atten_mask")
    if call.mode == 3 and not call.takes_flash_path:
        require(
            all(rows <= columns for rows, columns in call.lengths),
            f"TND with sparse_mode 3 needs Sq <= Skv in every sequence, got {call.lengths}",
        )


def _check_compressed(call: InferCall) -> None:
    mask = call.mask
    require(mask is not None, f"sparse_mode {call.mode} needs atten_mask")
    shapes = [(*ones, *_COMPRESSED) for ones in ((), (1,), (1, 1))]
    require(
        tuple(mask.shape) in shapes,
        f"sparse_mode {call.mode} needs atten_mask of a shape in {shapes}, got {tuple(mask.shape)}",
    )
    require(
        torch.equal(mask.view(_COMPRESSED).to(torch.uint8), upper_triangle()),
        f"sparse_mode {call.mode} needs the upper triangle (diagonal 1) as atten_mask",
    )


def _check_band(call: InferCall) -> None:
    band = f"pre_tokens {call.pre} and next_tokens {call.next}"
    require(call.pre + call.next >= 0, f"{band} need a sum that is not negative")
    require(
        all(call.pre >= -rows and call.next >= -columns for rows, columns in call.lengths),
        f"{band} must not be below -Sq and -Skv of {call.lengths}",
    )


def _check_matrix(call: InferCall) -> None:
    mask = call.mask
    require(mask is not None, f"sparse_mode {call.mode} needs atten_mask")
    rows = call.query.shape[call.layout.index("S")]
    if call.is_paged:
        columns = call.block_table.shape[1] * call.block_size
        fits = mask.shape[-1] >= columns
    else:
        columns = call.key.shape[call.layout.index("S")]
        fits = mask.shape[-1] in _padded(columns)
    leading = [(), (1,), (call.batch,), (1, 1), (call.batch, 1)]
    require(
        fits and mask.shape[-2] in _padded(rows) and tuple(mask.shape[:-2]) in leading,
        f"sparse_mode {call.mode} needs atten_mask (.., {rows}, {columns}), got "
        f"{tuple(mask.shape)}",
    )
    if call.mode == 0:
        _check_agreement(call)


def _padded(size: int) -> Sequence[int]:
    return (size, -(-size // 16) * 16, -(-size // 32) * 32)


def _check_agreement(call: InferCall) -> None:
    i = torch.arange(call.mask.shape[-2], device="cpu")[:, None]
    j = torch.arange(call.mask.shape[-1], device="cpu")[None, :]
    visited = (j - i >= -call.pre) & (j - i <= call.next)
    require(
        not bool(((call.mask == 0) & ~visited).any()),
        "sparse_mode 0: pre_tokens and next_tokens must agree with atten_mask",
    )

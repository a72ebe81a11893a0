"""A card that answers without an error, and wrongly: what no rule of ours can foresee.

`with lying("scale forgotten"):` makes the simulated card tell one of `LIES`. Most are told by
reading an argument as another one; a few bend what a kernel does, or what it returns. Of a real
card "averages" alone is reported; each is a mistake that a release could bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .memory import host_view, to_device

__all__ = [
    "LIES",
    "arguments",
    "kept",
    "key_heads",
    "lying",
    "offset",
    "results",
    "summed_by_key_head",
    "told",
]

Given = dict[str, Any]
Bend = Callable[[Given], Given]

_told: list[str] = []


@contextmanager
def lying(lie: str) -> Iterator[None]:
    """Let the card tell one of `LIES` inside the block, in every thread."""
    if lie not in LIES:
        raise ValueError(f"{lie!r} is none of {sorted(LIES)}")
    _told.append(lie)
    try:
        yield
    finally:
        _told.remove(lie)


def told(lie: str) -> bool:
    return lie in _told


def arguments(name: str, given: Given) -> Given:
    """The arguments of an operator as the card reads them."""
    for lie in _told:
        operators, bend = LIES[lie]
        if bend is not None and name.startswith(operators):
            with torch._C.DisableTorchFunction():
                given = bend({**given})
    return given


def _with(*names: str, value: Callable[[Any], Any]) -> Bend:
    def bend(given: Given) -> Given:
        for name in names:
            if given.get(name) is not None:
                given[name] = value(given[name])
        return given

    return bend


def _band(side: str, by: int) -> Bend:
    """A window that is wider or narrower; 2147483647 is none."""

    def bend(given: Given) -> Given:
        for name in (f"{side}_tokens", f"{side}_tockens"):
            if name in given and given["sparse_mode"] == 4 and given[name] < 2147483647:
                given[name] = given[name] + by
        return given

    return bend


def _changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return to_device(change(host_view(tensor).clone()), tensor.device)


def _confused(given: Given) -> Given:
    """The second sequence reads the keys of the first."""
    if given.get("block_table") is not None:
        given["block_table"] = _changed(given["block_table"], _first_pages_for_second)
        return given
    layout = given["input_layout"].upper()
    ends = given.get("actual_seq_kvlen", given.get("actual_seq_lengths_kv"))

    def change(x: torch.Tensor) -> torch.Tensor:
        if layout == "TND":
            if ends is None or len(ends) < 2 or not ends[0] or ends[1] <= ends[0]:
                return x
            places = torch.arange(int(ends[1]) - int(ends[0]), device="cpu") % int(ends[0])
            x[int(ends[0]) : int(ends[1])] = x[places]
        elif x.shape[0] > 1:
            x[1] = x[0]
        return x

    return {**given, **{name: _changed(given[name], change) for name in ("key", "value")}}


def _first_pages_for_second(table: torch.Tensor) -> torch.Tensor:
    if table.shape[0] > 1:
        table[1, 0] = table[0, 0]
    return table


def _shuffled(given: Given) -> Given:
    """The first two pages of each sequence that has so many are exchanged."""
    lengths = given.get("actual_seq_lengths_kv", given.get("actual_seq_kvlen"))

    def change(table: torch.Tensor) -> torch.Tensor:
        for row, length in zip(table, lengths, strict=True):
            if length > given["block_size"]:
                row[:2] = row[:2].flip(0)
        return table

    return _with("block_table", value=lambda table: _changed(table, change))(given)


def _later(given: Given) -> Given:
    """ALiBi counts from the key beside."""
    if given.get("pse") is not None:
        given["q_start_idx"] = [(given.get("q_start_idx") or [0])[0] + 1]
    return given


def _first_slopes(given: Given) -> Given:
    def change(slopes: torch.Tensor) -> torch.Tensor:
        return slopes[:1].expand_as(slopes).clone() if slopes.dim() == 2 else slopes

    return _with("pse", value=lambda pse: _changed(pse, change))(given)


def _next_slots(given: Given) -> Given:
    """Each token is written a position too late."""
    blocks, size = given["key_cache"].shape[:2]

    def change(slots: torch.Tensor) -> torch.Tensor:
        return (slots + 1) % (blocks * size)

    return _with("slot_mapping", value=lambda slots: _changed(slots, change))(given)


def _first_blocks(given: Given) -> Given:
    """The first token of each page goes to the page before it."""
    blocks, size = given["key_cache"].shape[:2]

    def change(slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots % size == 0, (slots - size) % (blocks * size), slots)

    return _with("slot_mapping", value=lambda slots: _changed(slots, change))(given)


def _exchanged_pages(given: Given) -> Given:
    """Of each sequence that has two pages the first two are exchanged."""
    size = given["key_cache"].shape[1]
    lengths = host_view(given["seq_lens"])

    def change(table: torch.Tensor) -> torch.Tensor:
        for row, length in zip(table, lengths, strict=True):
            if length > size:
                row[:2] = row[:2].flip(0)
        return table

    return _with("block_tables", value=lambda table: _changed(table, change))(given)


def _exchanged_halves(given: Given) -> Given:
    def change(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(x.chunk(2, -1)[::-1], -1)

    return {**given, "input": _changed(given["input"], change)}


_ATTENTION = ("npu_fusion_attention", "npu_fused_infer_attention_score")
_TRAINING = ("npu_fusion_attention",)
_INFERENCE = ("npu_fused_infer_attention_score",)
_ROTARY = ("npu_rotary_mul",)
_SCATTER, _GATHER = ("npu_scatter_pa_kv_cache",), ("npu_gather_pa_kv_cache",)
_NORMS = ("npu_rms_norm", "npu_add_rms_norm", "npu_add_layer_norm")
_LOSSES = ("npu_cross_entropy_loss",)

LIES: dict[str, tuple[tuple[str, ...], Bend | None]] = {
    "causal from the top left": (_ATTENTION, None),
    "mask ignored": (_ATTENTION, None),
    "window one wider on the left": (_ATTENTION, _band("pre", 1)),
    "window one narrower on the left": (_ATTENTION, _band("pre", -1)),
    "window one wider on the right": (_ATTENTION, _band("next", 1)),
    "window one narrower on the right": (_ATTENTION, _band("next", -1)),
    "scale forgotten": (_ATTENTION, _with("scale", "scale_value", value=lambda _: 1.0)),
    "lse in base 2": (_ATTENTION, None),
    "lse without scale": (_ATTENTION, None),
    "sink ignored": (_ATTENTION, _with("sink", value=lambda _: None)),
    "alibi with the wrong sign": (
        _TRAINING,
        _with("pse", value=lambda pse: _changed(pse, torch.neg)),
    ),
    "alibi from the wrong origin": (_TRAINING, _later),
    "alibi of the first sequence for all": (_TRAINING, _first_slopes),
    "heads grouped the other way": (_ATTENTION, None),
    "dropout not scaled": (_TRAINING, None),
    "dropout drawn anew in the gradient": (
        ("npu_fusion_attention_grad",),
        _with("seed", value=lambda seed: seed + 1),
    ),
    "last tile of keys dropped": (_ATTENTION, None),
    "second sequence reads the keys of the first": (_ATTENTION, _confused),
    "pages in the wrong order": (_INFERENCE, _shuffled),
    "new keys a position too late": (_SCATTER, _next_slots),
    "new keys in the wrong page": (_SCATTER, _first_blocks),
    "new values are the new keys": (_SCATTER, lambda given: {**given, "value": given["key"]}),
    "keys gathered in the wrong order of pages": (_GATHER, _exchanged_pages),
    "averages": (_ATTENTION, _with("scale", "scale_value", value=lambda _: 0.0)),
    "gradients of q halved": (_TRAINING, None),
    "gradients of k halved": (_TRAINING, None),
    "gradients of v halved": (_TRAINING, None),
    "gradients of the last key lost": (_TRAINING, None),
    "NaN in rows without keys": (_ATTENTION, None),
    "rotary half and interleaved exchanged": (
        _ROTARY,
        _with("rotary_mode", value=lambda mode: "half" if mode == "interleave" else "interleave"),
    ),
    "rotary turns back": (_ROTARY, _with("r2", value=lambda sin: _changed(sin, torch.neg))),
    "norm without eps": (_NORMS, _with("epsilon", value=lambda _: 0.0)),
    "norm without weight": (_NORMS, _with("gamma", value=lambda x: _changed(x, torch.ones_like))),
    "norm without residual": (
        ("npu_add_rms_norm", "npu_add_layer_norm"),
        _with("x2", value=lambda x: _changed(x, torch.zeros_like)),
    ),
    "gradients of a norm halved": (_NORMS, None),
    "swiglu gates the other half": (("npu_swiglu",), _exchanged_halves),
    "cross entropy of the next class": (
        _LOSSES,
        _with("target", value=lambda x: _changed(x, lambda t: (t - 1).clamp(min=0))),
    ),
    "gradients of a cross entropy halved": (_LOSSES, None),
}
"""Each lie: the operators that tell it (by the beginnings of their names), and how they read their
arguments; None where it is told in another place of this file.
"""


def offset(bottom_right: int) -> int:
    """How far the last query is from the last key, on which a mask is hung up."""
    return 0 if told("causal from the top left") else bottom_right


def kept(mask: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor | None:
    """Which (row, column) of a sequence take part, None for all."""
    if told("mask ignored"):
        mask = None
    end = (columns - 1) // 128 * 128
    if not told("last tile of keys dropped") or end <= 0:
        return mask
    whole = torch.ones(rows, columns, dtype=torch.bool, device="cpu") if mask is None else mask
    seen = torch.arange(columns, device="cpu") < end
    # a row must keep a key, or it would be seen to have none
    return torch.where((whole & seen).any(-1, keepdim=True), whole & seen, whole)


def key_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads, ...] of [nheads_k, ...]: the key head of each query head."""
    group = heads // tensor.shape[0]
    if told("heads grouped the other way"):
        return tensor.repeat(group, *[1] * (tensor.dim() - 1))
    return tensor.repeat_interleave(group, 0)


def summed_by_key_head(gradient: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Gradients of query heads, summed over those that share a key head."""
    if told("heads grouped the other way"):
        return gradient.unflatten(0, (-1, kv_heads)).sum(0)
    return gradient.unflatten(0, (kv_heads, -1)).sum(1)


def results(
    name: str, given: Given, returned: Any, again: Callable[..., tuple[torch.Tensor, ...]]
) -> None:
    """Bend what an operator has computed, where it lies.

    Args:
        again: calls the operator with other arguments, and more of them for torch_npu.
    """
    if not _told:
        return
    with torch._C.DisableTorchFunction():
        several = returned if isinstance(returned, (tuple, list)) else (returned,)
        views = [host_view(x) if isinstance(x, torch.Tensor) else x for x in several]
        if name.startswith(_INFERENCE):
            _bend_inference(given, views, again)
        elif "_grad" in name and name.startswith(_TRAINING):
            _bend_gradients(views)
        elif name.startswith(_TRAINING):
            _bend_training(given, views, again)
        elif "backward" in name:
            halved = "a norm" if name.startswith(_NORMS) else "a cross entropy"
            if told(f"gradients of {halved} halved") and name.startswith((*_NORMS, *_LOSSES)):
                views[0].mul_(0.5)


def _bend_training(given: Given, views: list[Any], again: Any) -> None:
    out, top, total = views[:3]
    if told("lse in base 2"):
        top.copy_((top + total.log()) / math.log(2))
        total.fill_(1)
    if told("lse without scale"):
        _, raw_top, raw_total = again({**given, "scale": 1.0})[:3]
        top.copy_(host_view(raw_top))
        total.copy_(host_view(raw_total))
    if told("dropout not scaled"):
        out.mul_(given["keep_prob"])
    if told("NaN in rows without keys"):
        # (batch, nheads, seqlen_q, 8); packed rows without keys are refused before
        keyless = top[..., 0] < -3e38
        if out.dim() == 4 and given["input_layout"].upper() == "BSND":
            out.transpose(1, 2)[keyless] = math.nan


def _bend_inference(given: Given, views: list[Any], again: Any) -> None:
    out, lse = views[:2]
    scale = "scale" if "scale" in given else "softmax_scale"
    if told("NaN in rows without keys"):
        flag = "softmax_lse_flag" if "softmax_lse_flag" in given else "return_softmax_lse"
        known = host_view(again({**given, flag: True}, **{flag: True})[1])
        out.masked_fill_(known.isposinf(), math.nan)
    if lse.numel() and told("lse in base 2"):
        lse.div_(math.log(2))
    if lse.numel() and told("lse without scale"):
        lse.copy_(host_view(again({**given, scale: 1.0})[1]))


def _bend_gradients(views: list[Any]) -> None:
    dq, dk, dv = views[:3]
    for name, grad in (("q", dq), ("k", dk), ("v", dv)):
        if told(f"gradients of {name} halved"):
            grad.mul_(0.5)
    if told("gradients of the last key lost"):
        for grad in (dk, dv):
            grad.flatten(0, -3)[-1] = 0

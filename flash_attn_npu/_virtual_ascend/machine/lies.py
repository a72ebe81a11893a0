"""A card that answers without an error, and wrongly: what no rule of ours can foresee.

`with lying("scale forgotten"):` makes the simulated card tell one of `LIES`. Most are told by
reading an argument as another one; a few bend what a kernel does, or what it returns. Of a real
card "averages" alone is reported; each is a mistake that a release could bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from . import bends
from .bends import Bend, Given, changing, replacing
from .memory import host_view

__all__ = [
    "LIES",
    "arguments",
    "honest",
    "kept",
    "key_heads",
    "lying",
    "offset",
    "results",
    "summed_by_key_head",
    "told",
]

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


def honest() -> bool:
    return not _told


def arguments(name: str, given: Given) -> Given:
    """The arguments of an operator as the card reads them."""
    for lie in _told:
        operators, bend = LIES[lie]
        if bend is not None and name.startswith(operators):
            with torch._C.DisableTorchFunction():
                given = bend({**given})
    return given


_ATTENTION = ("npu_fusion_attention", "npu_fused_infer_attention_score")
_TRAINING = ("npu_fusion_attention",)
_INFERENCE = ("npu_fused_infer_attention_score",)
_SINKS = ("sink", "learnable_sink")
_ROTARY = ("npu_rotary_mul",)
_LOOKUP = ("npu_mrope",)
_SCATTER, _GATHER = ("npu_scatter_pa_kv_cache",), ("npu_gather_pa_kv_cache",)
_NORMS = ("npu_rms_norm", "npu_add_rms_norm", "npu_add_layer_norm")
_GATES = ("npu_swiglu",)
_GEGLU = ("npu_geglu",)
_LOSSES = ("npu_cross_entropy_loss",)

LIES: dict[str, tuple[tuple[str, ...], Bend | None]] = {
    "causal from the top left": (_ATTENTION, None),
    "mask ignored": (_ATTENTION, None),
    "window one wider on the left": (_ATTENTION, bends.band("pre", 1)),
    "window one narrower on the left": (_ATTENTION, bends.band("pre", -1)),
    "window one wider on the right": (_ATTENTION, bends.band("next", 1)),
    "window one narrower on the right": (_ATTENTION, bends.band("next", -1)),
    "window sides exchanged": (_ATTENTION, bends.exchanged_sides),
    "lengths of queries taken from keys": (_TRAINING, bends.lengths_of_keys),
    "scale of the headdim, whatever is given": (_ATTENTION, bends.scale_of_headdim),
    "scale forgotten": (_ATTENTION, replacing(*bends.SCALES, value=lambda _: 1.0)),
    "lse in base 2": (_ATTENTION, None),
    "lse without scale": (_ATTENTION, None),
    "sink ignored": (_ATTENTION, replacing(*_SINKS, value=lambda _: None)),
    "sink of the next head": (_ATTENTION, changing(*_SINKS, change=lambda x: x.roll(-1))),
    "sinks of the first key head for all": (_INFERENCE, bends.first_sinks),
    "sink scaled as scores are": (_ATTENTION, bends.scaled_sink),
    "sink read in the other half precision": (_INFERENCE, bends.misread_sink),
    "weight of a sink given to the first key": (_INFERENCE, None),
    "lse of the next head": (_ATTENTION, None),
    "alibi of the next head": (_TRAINING, changing("pse", change=lambda x: x.roll(-1, -1))),
    "alibi with the wrong sign": (
        _TRAINING,
        changing("pse", change=torch.neg),
    ),
    "alibi from the wrong origin": (_TRAINING, bends.later),
    "alibi of the first sequence for all": (_TRAINING, bends.first_slopes),
    "heads grouped the other way": (_ATTENTION, None),
    "values of the next key head": (
        _TRAINING,
        changing("value", change=lambda x: x.roll(-1, -2)),
    ),
    "last row of each tile repeats the one before": (_TRAINING, None),
    "dropout not scaled": (_TRAINING, None),
    "dropout keeps what it should drop": (
        _TRAINING,
        replacing("keep_prob", value=lambda p: 1 - p if p < 1 else p),
    ),
    "dropout drawn anew in the gradient": (
        ("npu_fusion_attention_grad",),
        replacing("seed", value=lambda seed: seed + 1),
    ),
    "last tile of keys dropped": (_ATTENTION, None),
    "partial tile of keys dropped": (_ATTENTION, None),
    "second sequence reads the keys of the first": (_ATTENTION, bends.confused),
    "pages in the wrong order": (_INFERENCE, bends.shuffled),
    "pages shifted from the second on": (_INFERENCE, bends.shifted_pages),
    "new keys a position too late": (_SCATTER, bends.next_slots),
    "new keys in the wrong page": (_SCATTER, bends.first_blocks),
    "new values are the new keys": (_SCATTER, lambda given: {**given, "value": given["key"]}),
    "keys gathered in the wrong order of pages": (_GATHER, bends.exchanged_pages),
    "averages": (_ATTENTION, replacing(*bends.SCALES, value=lambda _: 0.0)),
    "gradients of q halved": (_TRAINING, None),
    "gradients of k halved": (_TRAINING, None),
    "gradients of v halved": (_TRAINING, None),
    "gradients of the last key lost": (_TRAINING, None),
    "gradients of the last key head lost": (_TRAINING, None),
    "gradients of the last sequence lost": (_TRAINING, None),
    "gradients of a sink lost": (_TRAINING, None),
    "NaN in rows without keys": (_ATTENTION, None),
    "rotary half and interleaved exchanged": (
        _ROTARY + _LOOKUP,
        replacing(
            "rotary_mode", value=lambda mode: "half" if mode == "interleave" else "interleave"
        ),
    ),
    "rotary turns back": (_ROTARY, changing("r2", change=torch.neg)),
    "rotary tables one row late": (
        _ROTARY,
        changing("r1", "r2", change=lambda table: table.roll(1, 1)),
    ),
    "positions one row late": (_LOOKUP, bends.next_rows),
    "position of the first token for all": (
        _LOOKUP,
        changing("positions", change=lambda rows: rows[:1].expand(len(rows))),
    ),
    "first row for every position": (_LOOKUP, changing("positions", change=torch.zeros_like)),
    "sin read as cos": (
        _LOOKUP,
        changing("cos_sin_cache", change=lambda table: table.roll(table.shape[1] // 2, 1)),
    ),
    "keys left as they are": (_LOOKUP, None),
    "first head for all": (
        _LOOKUP,
        bends.first_heads,
    ),
    "norm without eps": (_NORMS, replacing("epsilon", value=lambda _: 0.0)),
    "norm without weight": (_NORMS, changing("gamma", change=torch.ones_like)),
    "norm without bias": (_NORMS, changing("beta", change=torch.zeros_like)),
    "norm without residual": (
        ("npu_add_rms_norm", "npu_add_layer_norm"),
        changing("x2", change=torch.zeros_like),
    ),
    "gradients of a norm halved": (_NORMS, None),
    "gradients of a norm's weight halved": (_NORMS, None),
    "gradients of a norm's sum lost": (
        ("npu_add_layer_norm_backward",),
        replacing("dsum_opt", value=lambda _: None),
    ),
    "swiglu gates the other half": (_GATES, bends.exchanged_halves),
    "gradients of swiglu exchanged": (_GATES, None),
    "geglu gates the other half": (_GEGLU, bends.exchanged_halves),
    "geglu activates left": (_GEGLU, replacing("activate_left", value=lambda left: not left)),
    "geglu by tanh": (_GEGLU, replacing("approximate", value=lambda _: 1)),
    "label smoothing ignored": (_LOSSES, replacing("label_smoothing", value=lambda _: 0.0)),
    "cross entropy of the next class": (
        _LOSSES,
        changing("target", change=lambda t: (t - 1).clamp(min=0)),
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
    last, partial = ((columns - extra) // 128 * 128 for extra in (1, 0))
    lies = {"last tile of keys dropped": last, "partial tile of keys dropped": partial}
    end = min((end for lie, end in lies.items() if told(lie)), default=columns)
    if not 0 < end < columns:
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
            _bend_gradients(given, views)
        elif name.startswith(_TRAINING):
            _bend_training(given, views, again)
        elif name.startswith(_LOOKUP) and told("keys left as they are"):
            views[1].copy_(host_view(given["key"]))
        elif "backward" in name:
            _bend_backward(name, views)


def _bend_training(given: Given, views: list[Any], again: Any) -> None:
    out, top, total = views[:3]
    if told("lse in base 2"):
        top.copy_((top + total.log()) / math.log(2))
        total.fill_(1)
    if told("lse without scale"):
        _, raw_top, raw_total = again({**given, "scale": 1.0})[:3]
        top.copy_(host_view(raw_top))
        total.copy_(host_view(raw_total))
    if told("lse of the next head"):
        for statistics in (top, total):
            statistics.copy_(statistics.roll(-1, 1))
    if told("last row of each tile repeats the one before"):
        for rows in _sequences(given, out, "actual_seq_qlen"):
            rows[15::16] = rows[14::16][: len(rows[15::16])]
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
        asked = {**given, flag: True, "learnable_sink": None}
        known = host_view(again(asked, **{flag: True})[1])
        out.masked_fill_(known.isposinf(), math.nan)
    if lse.numel() and told("lse in base 2"):
        lse.div_(math.log(2))
    if lse.numel() and told("lse of the next head"):
        lse.copy_(lse.roll(-1, 1))
    if lse.numel() and told("lse without scale"):
        lse.copy_(host_view(again({**given, scale: 1.0})[1]))


def _bend_gradients(given: Given, views: list[Any]) -> None:
    dq, dk, dv = views[:3]
    for name, grad in (("q", dq), ("k", dk), ("v", dv)):
        if told(f"gradients of {name} halved"):
            grad.mul_(0.5)
    for grad in (dk, dv):
        if told("gradients of the last key lost"):
            grad.flatten(0, -3)[-1] = 0
        if told("gradients of the last key head lost"):
            grad[..., -1, :] = 0
        if told("gradients of the last sequence lost"):
            _sequences(given, grad, "actual_seq_kvlen")[-1].zero_()
    if told("gradients of a sink lost") and given.get("sink") is not None:
        views[-1].zero_()


def _sequences(given: Given, x: torch.Tensor, ends: str) -> list[torch.Tensor]:
    """The rows of each sequence, as views."""
    if given["input_layout"].upper() != "TND":
        return list(x)
    starts = [0, *given[ends]]
    return [x[first:last] for first, last in pairwise(starts)]


def _bend_backward(name: str, views: list[Any]) -> None:
    """Of what is computed row by row."""
    halved = "a norm" if name.startswith(_NORMS) else "a cross entropy"
    if told(f"gradients of {halved} halved") and name.startswith((*_NORMS, *_LOSSES)):
        views[0].mul_(0.5)
    if told("gradients of a norm's weight halved") and name.startswith(_NORMS):
        views[2 if "layer" in name else 1].mul_(0.5)
    if told("gradients of swiglu exchanged") and name.startswith(_GATES):
        views[0].copy_(views[0].roll(views[0].shape[-1] // 2, -1))

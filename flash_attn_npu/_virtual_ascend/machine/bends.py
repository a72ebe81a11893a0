"""How a card that lies reads the arguments of an operator: see `lies`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .memory import host_view, to_device

__all__ = [
    "SCALES",
    "Bend",
    "Given",
    "band",
    "changed",
    "changing",
    "confused",
    "exchanged_halves",
    "exchanged_pages",
    "exchanged_sides",
    "first_blocks",
    "first_heads",
    "first_sinks",
    "first_slopes",
    "later",
    "lengths_of_keys",
    "misread_sink",
    "next_rows",
    "next_slots",
    "replacing",
    "scale_of_headdim",
    "scaled_sink",
    "shifted_pages",
    "shuffled",
]

Given = dict[str, Any]
Bend = Callable[[Given], Given]

UNLIMITED = 2147483647
SCALES = ("scale", "scale_value", "softmax_scale")
"""What operators call it."""


def replacing(*names: str, value: Callable[[Any], Any]) -> Bend:
    def bend(given: Given) -> Given:
        for name in names:
            if given.get(name) is not None:
                given[name] = value(given[name])
        return given

    return bend


def band(side: str, by: int) -> Bend:
    """A window that is wider or narrower."""

    def bend(given: Given) -> Given:
        for name in (f"{side}_tokens", f"{side}_tockens"):
            if name in given and given["sparse_mode"] == 4 and given[name] < UNLIMITED:
                given[name] = given[name] + by
        return given

    return bend


def changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return to_device(change(host_view(tensor).clone()), tensor.device)


def confused(given: Given) -> Given:
    """The second sequence reads the keys of the first."""
    if given.get("block_table") is not None:
        given["block_table"] = changed(given["block_table"], _first_pages_for_second)
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

    return {**given, **{name: changed(given[name], change) for name in ("key", "value")}}


def _first_pages_for_second(table: torch.Tensor) -> torch.Tensor:
    if table.shape[0] > 1:
        table[1, 0] = table[0, 0]
    return table


def shuffled(given: Given) -> Given:
    """The first two pages of each sequence that has so many are exchanged."""
    lengths = given.get("actual_seq_lengths_kv", given.get("actual_seq_kvlen"))

    def change(table: torch.Tensor) -> torch.Tensor:
        for row, length in zip(table, lengths, strict=True):
            if length > given["block_size"]:
                row[:2] = row[:2].flip(0)
        return table

    return replacing("block_table", value=lambda table: changed(table, change))(given)


def later(given: Given) -> Given:
    """ALiBi counts from the key beside."""
    if given.get("pse") is not None:
        given["q_start_idx"] = [(given.get("q_start_idx") or [0])[0] + 1]
    return given


def first_slopes(given: Given) -> Given:
    def change(slopes: torch.Tensor) -> torch.Tensor:
        return slopes[:1].expand_as(slopes).clone() if slopes.dim() == 2 else slopes

    return replacing("pse", value=lambda pse: changed(pse, change))(given)


def exchanged_halves(given: Given) -> Given:
    def change(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(x.chunk(2, -1)[::-1], -1)

    return {**given, "input": changed(given["input"], change)}


def changing(*names: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Bend:
    """Tensors of these names, changed."""
    return replacing(*names, value=lambda tensor: changed(tensor, change))


def first_sinks(given: Given) -> Given:
    """A head's sink is looked up by its place among the heads of its key head."""
    heads_k = given["num_key_value_heads"]

    def change(sink: torch.Tensor) -> torch.Tensor:
        return sink[: sink.shape[0] // heads_k].repeat(heads_k)

    return changing("learnable_sink", change=change)(given)


def misread_sink(given: Given) -> Given:
    """The bits of bfloat16 are read as float16, or the other way."""

    def change(sink: torch.Tensor) -> torch.Tensor:
        other = torch.float16 if sink.dtype == torch.bfloat16 else torch.bfloat16
        return sink.view(other).to(sink.dtype)

    return changing("learnable_sink", change=change)(given)


def scaled_sink(given: Given) -> Given:
    scale = next(given[name] for name in SCALES if name in given)
    return changing("sink", "learnable_sink", change=lambda sink: sink * scale)(given)


def exchanged_sides(given: Given) -> Given:
    """What a window shows before a query is shown behind it."""
    if given["sparse_mode"] == 4:
        for end in ("tokens", "tockens"):
            if f"pre_{end}" in given:
                before, after = given[f"pre_{end}"], given[f"next_{end}"]
                given |= {f"pre_{end}": after, f"next_{end}": before}
    return given


def scale_of_headdim(given: Given) -> Given:
    """Whatever scale is given, that of the headdim is taken."""
    scale = given["query"].shape[-1] ** -0.5
    return {**given, **{n: scale for n in SCALES if n in given}}


def shifted_pages(given: Given) -> Given:
    """The second page of a sequence is taken to be its third, and so on."""

    def change(table: torch.Tensor) -> torch.Tensor:
        table[:, 1:] = table[:, 1:].roll(-1, 1)
        return table

    return changing("block_table", change=change)(given)


def lengths_of_keys(given: Given) -> Given:
    """Packed queries are cut where the keys are, if there are as many of both."""
    ends_q, ends_k = given.get("actual_seq_qlen"), given.get("actual_seq_kvlen")
    if ends_q and ends_k and ends_q[-1] == ends_k[-1]:
        given["actual_seq_qlen"] = ends_k
    return given


def next_slots(given: Given) -> Given:
    """Each token is written a position too late."""
    blocks, size = given["key_cache"].shape[:2]
    return changing("slot_mapping", change=lambda slots: (slots + 1) % (blocks * size))(given)


def first_blocks(given: Given) -> Given:
    """The first token of each page goes to the page before it."""
    blocks, size = given["key_cache"].shape[:2]

    def change(slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots % size == 0, (slots - size) % (blocks * size), slots)

    return changing("slot_mapping", change=change)(given)


def exchanged_pages(given: Given) -> Given:
    """Of each sequence that has two pages the first two are exchanged."""
    size = given["key_cache"].shape[1]
    lengths = host_view(given["seq_lens"])

    def change(table: torch.Tensor) -> torch.Tensor:
        for row, length in zip(table, lengths, strict=True):
            if length > size:
                row[:2] = row[:2].flip(0)
        return table

    return changing("block_tables", change=change)(given)


def next_rows(given: Given) -> Given:
    """Each token is turned as the one behind it."""
    rows = given["cos_sin_cache"].shape[0]
    return changing("positions", change=lambda positions: (positions + 1) % rows)(given)


def first_heads(given: Given) -> Given:
    """Every query head is read where the first one lies."""
    size = given["head_size"]

    def change(query: torch.Tensor) -> torch.Tensor:
        return query[:, :size].repeat(1, query.shape[1] // size)

    return changing("query", change=change)(given)

"""One call of npu_fusion_attention in any of its versions, unpacked: what every version means by
its arguments, and per-sequence views of its tensors and statistics. No rules and no arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..machine.memory import host_view


def is_ascend_950() -> bool:
    return "950" in os.environ.get("VIRTUAL_ASCEND_SOC", "")


@dataclass(frozen=True)
class AttentionCall:
    """The arguments by their meaning; tensors are host views of the device's memory."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: int
    layout: str
    pse: torch.Tensor | None
    pse_type: int
    q_start: int
    kv_start: int
    mask: torch.Tensor | None
    scale: float
    keep_prob: float
    pre: int
    next: int
    inner_precise: int
    mode: int
    cumulative_q: tuple[int, ...]
    cumulative_kv: tuple[int, ...]
    true_tnd_statistics: bool
    sink: torch.Tensor | None
    has_rope: bool

    @property
    def is_tnd(self) -> bool:
        return self.layout == "TND"

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(Sq, Skv) of every sequence."""
        if self.is_tnd:
            pairs = zip(_steps(self.cumulative_q), _steps(self.cumulative_kv), strict=True)
            return list(pairs)
        batch, rows, columns = self.dense_sizes()
        return [(rows, columns)] * batch

    def dense_sizes(self) -> tuple[int, int, int]:
        """(B, Sq, Skv) of a dense layout."""
        batch_axis, row_axis = self.layout.index("B"), self.layout.index("S")
        return (
            self.query.shape[batch_axis],
            self.query.shape[row_axis],
            self.key.shape[row_axis],
        )

    @property
    def kv_heads(self) -> int:
        if "H" in self.layout:
            width = self.query.shape[-1] // self.heads
            return self.key.shape[-1] // width
        return self.key.shape[self.layout.index("N")]

    @property
    def head_dims(self) -> tuple[int, int, int]:
        """(Dq, Dk, Dv)."""
        if "H" in self.layout:
            width = self.query.shape[-1] // self.heads
            groups = max(self.kv_heads, 1)
            return width, self.key.shape[-1] // groups, self.value.shape[-1] // groups
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]

    def split_q(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views [N, Sq, D] of a tensor laid out like the query, one for each sequence."""
        return self._split(tensor, self.heads, self.cumulative_q)

    def split_kv(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views [Nkv, Skv, D] of a tensor laid out like the key, one for each sequence."""
        return self._split(tensor, self.kv_heads, self.cumulative_kv)

    def _split(
        self, tensor: torch.Tensor, heads: int, cumulative: Sequence[int]
    ) -> list[torch.Tensor]:
        if self.is_tnd:
            steps = _steps(cumulative)
            starts = _starts(steps)
            pieces = zip(starts, steps, strict=True)
            return [tensor[start : start + step].transpose(0, 1) for start, step in pieces]
        return list(_to_bnsd(tensor, self.layout, heads))

    def split_statistics(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views [N, Sq, 8] of softmax_max or softmax_sum, one for each sequence."""
        if not self.is_tnd:
            return list(tensor)
        if self.true_tnd_statistics:
            return self._split(tensor, self.heads, self.cumulative_q)
        flat = tensor.reshape(-1)
        views, start = [], 0
        for rows in _steps(self.cumulative_q):
            size = self.heads * rows * 8
            views.append(flat[start : start + size].view(self.heads, rows, 8))
            start += size
        return views


def _to_bnsd(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    if layout == "BSH":
        return tensor.unflatten(2, (heads, -1)).transpose(1, 2)
    if layout == "SBH":
        return tensor.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


def _steps(cumulative: Sequence[int]) -> list[int]:
    """Lengths from cumulative lengths; the zeros that mark padding at the end have none."""
    steps, before = [], 0
    for value in cumulative:
        steps.append(max(value - before, 0))
        before = max(value, before)
    return steps


def _starts(steps: Sequence[int]) -> list[int]:
    starts, start = [], 0
    for step in steps:
        starts.append(start)
        start += step
    return starts


def unpack(version: int, given: dict[str, Any]) -> AttentionCall:
    """The call meant by the arguments of npu_fusion_attention(_grad)'s given version."""
    spelling = "tokens" if version == 2 else "tockens"
    # on a 950 the first version hands an empty one to the forward, without a word
    dropped = version == 1 and is_ascend_950() and "dy" not in given
    sink = None if dropped else _host(given["sink"])
    return AttentionCall(
        query=host_view(given["query"]),
        key=host_view(given["key"]),
        value=host_view(given["value"]),
        heads=given["head_num"],
        layout=given["input_layout"].upper(),
        pse=_host(given["pse"]),
        pse_type=given.get("pse_type", 1),
        q_start=_first(given.get("q_start_idx")),
        kv_start=_first(given.get("kv_start_idx")),
        mask=_host(given["atten_mask"]),
        scale=given["scale_value"] if "scale_value" in given else given["scale"],
        keep_prob=given["keep_prob"],
        pre=given[f"pre_{spelling}"],
        next=given[f"next_{spelling}"],
        inner_precise=given["inner_precise"],
        mode=given["sparse_mode"],
        cumulative_q=_lengths(given["actual_seq_qlen"]),
        cumulative_kv=_lengths(given["actual_seq_kvlen"]),
        # The second version forwards the argument to the kernels that take a sink only
        true_tnd_statistics=given["softmax_layout"] == "TND" and (version != 2 or sink is not None),
        sink=sink,
        has_rope=given.get("query_rope") is not None or given.get("key_rope") is not None,
    )


def _host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None or tensor.numel() == 0 else host_view(tensor)


def _first(values: Sequence[int] | None) -> int:
    return values[0] if values else 0


def _lengths(values: Any) -> tuple[int, ...]:
    if values is None:
        return ()
    return tuple(int(value) for value in values)

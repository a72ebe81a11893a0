"""torch.export keeps attention as one operator, for any batch and length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import flash_attn_npu as fa
from tests.helpers.compiled_cases import dense, packed

each_mode = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


class Dense(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.flash_attn_func(q, k, v, causal=True, window_size=(4, 0)) * 2


class Packed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fa.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 64, 64, softcap=9.0) * 2


def operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes]
    return [target for target in targets if "flash_attn" in target]


@each_mode
def test_dense_program_takes_any_batch_and_length(strict: bool) -> None:
    batch, seqlen_q, seqlen_k = Dim("batch"), Dim("seqlen_q"), Dim("seqlen_k")
    keys = {0: batch, 1: seqlen_k}
    model = Dense()
    program = export(
        model, dense(0), dynamic_shapes=({0: batch, 1: seqlen_q}, keys, keys), strict=strict
    )
    assert operators(program) == ["flash_attn_npu_shim._flash_attn_forward.default"]
    for step in range(3):
        inputs = dense(step)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@each_mode
def test_packed_program_survives_a_file(strict: bool, tmp_path: Path) -> None:
    total, entries = Dim("total"), Dim("entries")
    rows = {0: total}
    model = Packed()
    program = export(
        model, packed(0)[:4], dynamic_shapes=(rows, rows, rows, {0: entries}), strict=strict
    )
    assert operators(program) == ["flash_attn_npu_shim._flash_attn_varlen_forward.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for step in range(3):
        inputs = packed(step)[:4]
        torch.testing.assert_close(loaded.module()(*inputs), model(*inputs))

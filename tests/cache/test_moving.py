"""New keys into a cache, and keys out of it: one launch for both where an operator takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu._core.problems.transfer import APPEND, GATHER, Append, Gather, Transfer
from flash_attn_npu._core.table import cache as table
from flash_attn_npu._core.table import installed as shared_rows
from flash_attn_npu._core.table.choice import refusals
from flash_attn_npu._core.table.rule import Rule
from tests.helpers.cache_calls import CacheProblem, check, place
from tests.helpers.frames import frames
from tests.helpers.old_torch import needs
from tests.helpers.wheel import pretend_row, pretended

pytestmark = [needs("npu_scatter_pa_kv_cache", "cache_mode"), needs("npu_gather_pa_kv_cache")]

CHANGES: dict[str, Callable[[Transfer], Transfer]] = {
    "tensors outside an Ascend NPU": lambda p: p._replace(device=torch.device("cpu")),
    "Ascend 310P and 200I": lambda p: p,
    "new keys and values in a cache": lambda p: p,
    "keys and values copied out of a cache": lambda p: p,
    "a torch_npu older than 2.6.0": lambda p: p,
    f"new keys in a cache, a torch_npu without {APPEND}": lambda p: p,
    f"keys gathered from a cache, a torch_npu without {GATHER}": lambda p: p,
    "no position": lambda p: p._replace(empty=True),
    "a cache of float32 or float64": lambda p: p._replace(dtype=torch.float32),
    "a cache that is not contiguous": lambda p: p._replace(contiguous=False),
    "positions of no multiple of 32 bytes": lambda p: p._replace(token_bytes=48),
    "positions of more than 151552 bytes": lambda p: p._replace(token_bytes=151_584),
    "2**31 numbers and more, in a cache or out of it": lambda p: p._replace(huge=True),
    "new keys and values neither of which is contiguous": lambda p: p._replace(strided=True),
    "keys that do not start at the first position (cache_leftpad)": (
        lambda p: p._replace(padded=True)
    ),
    "keys in a cache, with gradient": lambda p: p._replace(needs_grad=True),
}


@pytest.fixture
def plain(npu: torch.device) -> dict[str, Transfer]:
    """For each operator a problem that it serves, at the limit of what it takes."""
    common: dict[str, Any] = {
        "function": "f", "device": npu, "dtype": torch.bfloat16, "empty": False,
        "token_bytes": 148 * 1024, "contiguous": True, "huge": False,
    }  # fmt: skip
    return {
        APPEND: Append(**common, strided=False, many=True),
        GATHER: Gather(**common, padded=False, needs_grad=False),
    }


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    rule = callspec.params.get("rule") if callspec else None
    if isinstance(rule, Rule):
        pretend_row(rule.name, monkeypatch)
        if rule.name.startswith("Ascend 310P"):
            monkeypatch.setattr(shared_rows, "soc_name", lambda device: "Ascend310P3")
    yield
    forget_all()


def test_every_rule_has_a_change() -> None:
    assert list(CHANGES) == [rule.name for rule in table.TABLE]


@pytest.mark.parametrize("rule", table.TABLE, ids=lambda rule: rule.name)
def test_the_rule_refuses(rule: Rule, plain: dict[str, Transfer]) -> None:
    if not rule.refused:
        assert [rule.present(problem) for problem in plain.values()] in (
            [True, False],
            [False, True],
        )
    for operator, problem in plain.items():
        changed = CHANGES[rule.name](problem) if operator in rule.refused else problem
        expected = (rule.refused[operator],) if operator in rule.refused else ()
        if ", a torch_npu" not in rule.name and not rule.name.startswith(("a torch_npu", "Ascend")):
            assert refusals(operator, problem) == ()
        assert set(expected) <= set(refusals(operator, changed))


CAUSAL = {"causal": True, "return_softmax_lse": True}
PAGED = CacheProblem((31, 17, 0), 16, 4, seqlen_new=3, nheads_k=2, group=2, options=CAUSAL)
PROBLEMS = {
    "pages": PAGED,
    "pages of 5": replace(PAGED, seqlen_cache=5, max_blocks=8),
    "rows": replace(PAGED, seqlen_cache=40, max_blocks=None, rows=(3, 0, 1)),
    "rotated": replace(PAGED, rotary_dim=64),
    "bfloat16": replace(PAGED, dtype=torch.bfloat16),
    "values alone strided": PAGED,
    "leftpad": replace(PAGED, max_blocks=None, seqlen_cache=40, leftpad=(3, 20, 5)),
}


def names(seen: Any) -> list[str]:
    return [launch.name for launch in seen.launches if "_pa_" in launch.name]


@pytest.mark.parametrize("name", PROBLEMS)
def test_new_keys_are_one_launch(npu: torch.device, name: str) -> None:
    """Answer and caches are the reference's, and nothing around a sequence is touched."""
    with virtual_ascend.record() as seen, reporting() as region:
        check(PROBLEMS[name], npu)
    assert names(seen)[0] == APPEND
    assert names(seen).count(APPEND) == 1
    (launch,) = [launch for launch in seen.launches if launch.name == APPEND]
    assert launch.arguments["cache_mode"] == "Norm"
    assert launch.arguments["slot_mapping"].dtype == torch.int32
    assert not any("append" in tally.function for tally in region.tallies)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_launches_and_copies_that_are_spared(npu: torch.device, softcap: float) -> None:
    """Against a torch_npu without the operators: two writes, two reads, and copies of places."""
    problem = replace(PAGED, options=CAUSAL | {"softcap": softcap} if softcap else CAUSAL)

    def step() -> tuple[int, int, Any]:
        placed, _ = place(problem, problem.arguments(), npu)
        flash_attn_with_kvcache(**placed)
        placed["cache_seqlens"] = placed["cache_seqlens"] + 1
        with virtual_ascend.record() as seen:
            flash_attn_with_kvcache(**placed)
        moves = [x for x in seen.operators if x.startswith(("aten::index", "aten::_index"))]
        return len(moves), len(seen.host_to_device), names(seen)

    with verifying("off"):
        new = step()
        with pretended("2.9.0"):
            old = step()
    assert new[2] == [APPEND, *([GATHER] if softcap else [])]
    assert old[2] == []
    assert new[0] == 0
    assert old[0] == (4 if softcap else 2)
    assert new[1] < old[1]


STRIDED: dict[str, tuple[bool, bool]] = {"k": (True, False), "v": (False, True), "kv": (True, True)}


@pytest.mark.parametrize("which", STRIDED)
def test_new_keys_that_are_strided(npu: torch.device, which: str) -> None:
    """One of them is copied; two copies would be a launch more than torch's own two."""
    arguments = PAGED.arguments()
    placed, _ = place(PAGED, arguments, npu)
    expected = place(PAGED, arguments, npu)[0]
    for name in which:
        wide = torch.cat((placed[name], placed[name]), 2)
        placed[name] = wide[:, :, : wide.shape[2] // 2]
    with virtual_ascend.record() as seen:
        out, _ = flash_attn_with_kvcache(**placed)
    assert names(seen) == ([] if which == "kv" else [APPEND])
    assert torch.equal(out, flash_attn_with_kvcache(**expected)[0])
    for name in ("k_cache", "v_cache"):
        assert torch.equal(bits(placed[name]), bits(expected[name]))


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def test_new_keys_that_are_views_of_the_cache(npu: torch.device) -> None:
    """They are read before they are written over."""
    arguments = replace(PAGED, lengths=(16, 16, 16), options={}).arguments()
    placed, _ = place(PAGED, arguments, npu)
    first = placed["block_table"][:, 0].long()
    held = placed["k_cache"][first[0], :9].clone()
    placed["k"] = placed["k_cache"][first[0], :9].view(3, 3, 2, 64)
    flash_attn_with_kvcache(**placed)
    second = placed["block_table"][:, 1].long()
    written = torch.cat([placed["k_cache"][page, :3] for page in second])
    assert torch.equal(bits(written), bits(held))


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_the_first_call_tries_it_in_a_cache_of_its_own(npu: torch.device, many: bool) -> None:
    """Once for each kind, and the caches of the call are never put at risk."""
    lengths, new = ((5, 9), 600) if many else ((5, 9), 2)
    problem = CacheProblem(lengths, 640, seqlen_new=new, headdim=64)
    with verifying("compose"):
        with virtual_ascend.record() as first:
            check(problem, npu)
        with virtual_ascend.record() as second:
            check(problem, npu)
    assert names(first) == [APPEND] * 2
    assert names(second) == [APPEND]
    tried, served = (x.arguments["key_cache"] for x in first.launches if x.name == APPEND)
    assert tried.data_ptr() != served.data_ptr()
    rows = [x.arguments["key"].shape[0] for x in first.launches if x.name == APPEND]
    assert all((count >= 1000) == many for count in rows)


def test_keys_are_gathered_where_none_may_be_padded(npu: torch.device) -> None:
    problem = replace(PAGED, options={"softcap": 5.0}, max_blocks=None, seqlen_cache=40)
    with virtual_ascend.record() as seen:
        check(problem, npu)
        check(replace(problem, leftpad=(3, 4, 0)), npu)
    assert names(seen) == [APPEND, GATHER, APPEND]


def test_an_inference_cache_is_written_where_it_was_made(npu: torch.device) -> None:
    with torch.inference_mode():
        placed, _ = place(PAGED, PAGED.arguments(), npu)
    with virtual_ascend.record() as seen:
        flash_attn_with_kvcache(**placed)
    assert names(seen) == [APPEND]


def test_a_graph_sees_that_the_caches_changed(npu: torch.device) -> None:
    placed, _ = place(PAGED, PAGED.arguments(), npu)
    before = [placed[name]._version for name in ("k_cache", "v_cache")]
    flash_attn_with_kvcache(**placed)
    assert all(
        placed[name]._version > old
        for name, old in zip(("k_cache", "v_cache"), before, strict=True)
    )


@pytest.mark.parametrize(("appends", "most"), [(False, 85), (True, 144)])
def test_little_stands_around_the_launches_on_a_card(npu, appends, most):
    half = {"device": npu, "dtype": torch.bfloat16}
    q, cache = torch.randn(2, 1, 8, 64, **half), torch.randn(2, 2, 128, 2, 64, **half).unbind()
    new = torch.randn(2, 2, 1, 2, 64, **half).unbind() if appends else ()
    lengths = torch.full((2,), 40, dtype=torch.int32, device=npu)

    def step() -> Tensor:
        return flash_attn_with_kvcache(q, *cache, *new, cache_seqlens=lengths, causal=True)

    step()
    seen = frames(step)
    assert len(seen) <= most, Counter(seen)

"""Every argument of every attention function does what the float64 reference says it does.

The arguments are read from the signatures: one that nobody thought of fails here. Each stands in
exactly one table, by what changing it does: another answer, another form, another place, nothing,
or a refusal.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import UnsupportedError
from tests.helpers import argument_harness as harness
from tests.helpers.argument_harness import Arguments
from tests.helpers.strategies import Problem, problems

# flash_attn_with_kvcache has tables of its own, in test_cache_arguments; fakes compute nothing
FUNCTIONS = [
    function
    for name, function in ((name, getattr(interface, name)) for name in interface.__all__)
    if inspect.isfunction(function)
    and name.lstrip("_").startswith("flash_attn_")
    and not name.endswith("_fake")
    and function is not interface.flash_attn_with_kvcache
]
BY_NAME = {function.__name__: function for function in FUNCTIONS}
P = 0.3


def other_values(name: str) -> Callable[[Arguments], Arguments]:
    def change(call: Arguments) -> Arguments:
        return {name: call[name].roll(1, 0).flip(-1) + 0.5}

    return change


def moved_boundary(name: str) -> Callable[[Arguments], Arguments]:
    """The last row of the first sequence becomes the first of the second."""

    def change(call: Arguments) -> Arguments:
        moved = call[name].clone()
        moved[1] -= 1
        return {name: moved}

    return change


def replaced(name: str, value: Any) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: value}


def slopes(call: Arguments) -> Arguments:
    nheads = harness.inputs_of(call)[0].shape[-2]
    return {"alibi_slopes": torch.linspace(0.25, 1.0, nheads)}


def sequences(call: Arguments) -> int:
    return len(call["cu_seqlens_k"]) - 1


CHANGES: dict[str, Callable[[Arguments], Arguments]] = {
    **{name: other_values(name) for name in ("q", "k", "v", "kv", "qkv", "dout", "out")},
    "softmax_lse": lambda call: {"softmax_lse": call["softmax_lse"] + 0.5},
    **{name: moved_boundary(name) for name in ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")},
    "dropout_p": replaced("dropout_p", P),
    # a backward under another scale than its forward's loses what the probabilities exceed 1 by
    "softmax_scale": replaced("softmax_scale", 0.45),
    "causal": replaced("causal", True),
    "window_size": replaced("window_size", (1, 1)),
    "window_size_left": replaced("window_size_left", 1),
    "window_size_right": replaced("window_size_right", 1),
    "softcap": replaced("softcap", 0.8),
    "alibi_slopes": slopes,
    # of keys in pages, see `before_changing`
    "block_table": lambda call: {"block_table": call["block_table"].flip(0).contiguous()},
    "leftpad_k": lambda call: {"leftpad_k": harness.int32([1, 2, 1][: sequences(call)])},
    "seqused_k": lambda call: {"seqused_k": call["cu_seqlens_k"].diff() - 1},
    # exchanged for that of another draw, see `with_dropout`
    "rng_state": lambda call: {
        "rng_state": call["other_rng_state"],
        "dropout_mask": call["other_mask"],
    },
}
NO_EFFECT: dict[str, tuple[Any, str]] = {
    "max_seqlen": (40, "an upper bound, and no window is as long as it is"),
    "max_seqlen_q": (40, "an upper bound"),
    "max_seqlen_k": (40, "an upper bound, except for windows at least as long (tested below)"),
    "deterministic": (True, "the order of sums may differ, their values may not"),
    "zero_tensors": (True, "rows of no sequence are always zeros"),
    "num_splits": (3, "how upstream divides its work"),
}
FORM = {"return_attn_probs": {}, "return_softmax": {"dropout_p": P}}
PLACE = ("dq", "dk", "dv")
UNSERVED: tuple[str, ...] = ()
TABLES = (CHANGES, NO_EFFECT, FORM, PLACE, UNSERVED)


def pairs_in(table: Any) -> list[tuple[Callable, str]]:
    """The functions' arguments that stand in the table."""
    return [(f, name) for f in FUNCTIONS for name in harness.parameters(f) if name in table]


def arguments_in(table: Any) -> pytest.MarkDecorator:
    """Parametrize over the functions' arguments that stand in the table."""
    pairs = pairs_in(table)
    ids = [f"{function.__name__}-{name}" for function, name in pairs]
    return pytest.mark.parametrize(("function", "argument"), pairs, ids=ids)


def lengths_for(function: Callable) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Two or three sequences, long enough for every change to be felt."""
    pair = st.tuples(st.integers(4, 9), st.integers(4, 9))
    if "qkv" in function.__name__:
        pair = st.integers(4, 9).map(lambda n: (n, n))
    several = st.tuples(pair, st.integers(2, 3))
    if harness.is_varlen(function):
        return st.lists(pair, min_size=2, max_size=3).map(tuple)
    return several.map(lambda drawn: (drawn[0],) * drawn[1])


def problems_for(function: Callable) -> st.SearchStrategy[Problem]:
    return problems(
        lengths_for(function),
        group=st.just(1) if "qkv" in function.__name__ else st.integers(1, 2),
        nheads_k=st.integers(1, 2),
        headdim=st.sampled_from((8, 16)),
        dtype=st.sampled_from((torch.float16, torch.float32)),
        causal=st.just(False),
        window_size=st.just((-1, -1)),
        layouts=st.just(("contiguous",) * 3),
    )


def for_all(function: Callable, check: Callable[[Problem], None]) -> None:
    """Run the check on a few problems that suit the function, the same ones every time."""
    profile = settings(max_examples=3, deadline=None, derandomize=True, database=None)
    profile(given(problem=problems_for(function))(check))()


def with_dropout(function: Callable, call: Arguments, device: torch.device) -> Arguments:
    """What a call needs to show the mask that it drops by."""
    if "dq" not in call:
        return {name: True for name in ("return_attn_probs", "return_softmax") if name in call}
    forward = BY_NAME[function.__name__.replace("backward", "forward")]
    there = {name: call.get(name) for name in harness.parameters(forward)}
    there |= {"dropout_p": P, "return_softmax": True, "zero_tensors": False, "num_splits": 0}
    one, other = (harness.run(forward, there, device) for _ in range(2))
    return {
        "rng_state": one["rng_state"],
        "dropout_mask": harness.masks_from(one["s_dmask"], call),
        "other_rng_state": other["rng_state"],
        "other_mask": harness.masks_from(other["s_dmask"], call),
    }


def before_changing(
    argument: str, function: Callable, call: Arguments, device: torch.device
) -> Arguments:
    """What the call needs for the argument to matter."""
    if argument in ("dropout_p", "rng_state"):
        call = call | with_dropout(function, call, device)
    if argument == "rng_state":
        call = call | {"dropout_p": P}
    return call | (harness.in_pages(call) if argument == "block_table" else {})


def unaccounted(function: Callable) -> list[str]:
    """Its arguments that do not stand in exactly one table."""
    names = harness.parameters(function)
    return [name for name in names if sum(name in table for table in TABLES) != 1]


@pytest.mark.parametrize("function", FUNCTIONS, ids=BY_NAME)
def test_every_argument_stands_in_one_table(function):
    assert unaccounted(function) == []


def test_a_forgotten_argument_is_noticed():
    def attend(q: torch.Tensor, forgotten: int, causal: bool) -> None: ...

    assert unaccounted(attend) == ["forgotten"]


def test_tables_name_real_arguments_only():
    known = {name for function in FUNCTIONS for name in harness.parameters(function)}
    assert set().union(*TABLES) == known


@arguments_in(CHANGES)
def test_changing_it_changes_the_answer_as_the_reference_says(device, function, argument):
    def check(problem: Problem) -> None:
        before = harness.arguments_for(function, problem)
        before = before_changing(argument, function, before, device)
        after = before | CHANGES[argument](before)
        answer = harness.run(function, after, device)
        if "dropout_mask" not in after and after["dropout_p"]:
            after["dropout_mask"] = harness.masks_from(answer["s_dmask"], after)
        harness.assert_right(answer, harness.truth(function, after))
        with pytest.raises(AssertionError, match=r"off by|infinite where"):
            harness.assert_right(answer, harness.truth(function, before))

    for_all(function, check)


@arguments_in(NO_EFFECT)
def test_changing_it_leaves_the_answer_alone(device, function, argument):
    value, reason = NO_EFFECT[argument]
    assert reason

    def check(problem: Problem) -> None:
        before = harness.arguments_for(function, problem)
        answer = harness.run(function, before | {argument: value}, device)
        harness.assert_right(answer, harness.truth(function, before))

    for_all(function, check)


@arguments_in(FORM)
def test_changing_it_changes_what_is_returned(device, function, argument):
    def check(problem: Problem) -> None:
        before = harness.arguments_for(function, problem) | FORM[argument]
        plain, more = (
            harness.run(function, before | {argument: wanted}, device) for wanted in (False, True)
        )
        if argument == "return_softmax":
            sides = (len(problem.seqlens), problem.nheads, harness.BLOCK, harness.BLOCK)
            assert (plain["s_dmask"].shape, more["s_dmask"].shape) == ((0,), sides)
            return
        assert more.keys() - plain.keys() == {"softmax_lse", "s_dmask"}
        assert more["s_dmask"].shape == (0,)
        expected = harness.truth(function, before)
        harness.assert_right(plain, expected)
        harness.assert_right(more, expected)

    for_all(function, check)


@arguments_in(PLACE)
def test_changing_it_changes_where_the_answer_lies(device, function, argument):
    def check(problem: Problem) -> None:
        call = harness.arguments_for(function, problem)
        first, second = (torch.full_like(call[argument], -7.0, device=device) for _ in range(2))
        for place in (first, second):
            answer = harness.run(function, call | {argument: place}, device)
            assert answer[argument].data_ptr() == place.data_ptr()
            harness.assert_right(answer, harness.truth(function, call))
            if place is first:
                assert (second == -7.0).all()

    for_all(function, check)


def test_what_is_not_served_is_refused_by_name(device):
    """Of the arguments that take a tensor for each sequence; at present all are served."""
    for function, argument in pairs_in(UNSERVED):

        def check(problem: Problem, function=function, argument=argument) -> None:
            call = harness.arguments_for(function, problem)
            call[argument] = torch.zeros(len(problem.seqlens), 2, dtype=torch.int32)
            with pytest.raises(UnsupportedError, match=argument):
                harness.run(function, call, device)

        for_all(function, check)


KEYS = {
    "pages": ("block_table",),
    "later-keys": ("leftpad_k", "seqused_k"),
    "all": ("block_table", "leftpad_k", "seqused_k"),
}
PAGED = [
    (function, names)
    for function in FUNCTIONS
    for names in KEYS.values()
    if set(names) <= set(harness.parameters(function))
]


@pytest.mark.parametrize(
    ("function", "names"), PAGED, ids=[f"{f.__name__}-{'+'.join(names)}" for f, names in PAGED]
)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (2, 1)}, {"softcap": 0.8}, {"alibi_slopes": True}],
    ids=str,
)
@pytest.mark.parametrize(("headdim", "page"), [(64, 16), (16, 3)], ids=["fused", "gathered"])
def test_keys_that_are_not_simply_packed(device, function, names, options, headdim, page):
    """With masks, and in pages that Ascend's kernel can read as well as in others."""
    problem = Problem(((4, 9), (7, 7), (3, 20)), 2, 2, headdim, dtype=torch.float16)
    call = harness.arguments_for(function, problem)
    call |= {name: value for name, value in options.items() if name in call}
    if "window" in options:
        named = {"window_size": (2, 1), "window_size_left": 2, "window_size_right": 1}
        call |= {name: value for name, value in named.items() if name in call}
    call |= slopes(call) if "alibi_slopes" in options else {}
    call |= harness.in_pages(call, page) if "block_table" in names else {}
    for name in set(names) - {"block_table"}:
        call |= CHANGES[name](call)
    harness.assert_right(harness.run(function, call, device), harness.truth(function, call))


@pytest.mark.parametrize(
    "function",
    [f for f in FUNCTIONS if "max_seqlen_k" in harness.parameters(f)],
    ids=lambda function: function.__name__,
)
def test_max_seqlen_k_decides_whether_a_window_is_one(device, function):
    """A side as long as max_seqlen_k is unlimited, and binds where there are more queries."""
    problem = Problem(((9, 4), (9, 4)), group=2, dtype=torch.float16, window_size=(4, 4))
    for longest, other in ((4, 5), (5, 4)):
        call = harness.arguments_for(function, problem) | {"max_seqlen_k": longest}
        answer = harness.run(function, call, device)
        harness.assert_right(answer, harness.truth(function, call))
        wrong = harness.truth(function, call | {"max_seqlen_k": other})
        with pytest.raises(AssertionError, match=r"off by|infinite where"):
            harness.assert_right(answer, wrong)

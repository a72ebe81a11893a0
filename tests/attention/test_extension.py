"""`flash_attn_gpu`, upstream's C++ extension: its argument order, its results, its refusals."""

import inspect

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import ArgumentError
from tests.helpers import argument_harness as harness
from tests.helpers import cache_harness as cache
from tests.helpers.argument_harness import Arguments
from tests.helpers.strategies import Problem

gpu = interface.flash_attn_gpu
P = 0.25
DENSE = Problem(((9, 13),) * 2, nheads_k=2, group=2, headdim=16, dtype=torch.float16, causal=True)
VARLEN = Problem(((5, 8), (9, 9)), 2, 2, 16, torch.bfloat16, causal=True)
ENTRIES = {
    "fwd": (interface._flash_attn_forward, DENSE),
    "varlen_fwd": (interface._flash_attn_varlen_forward, VARLEN),
    "bwd": (interface._flash_attn_backward, DENSE),
    "varlen_bwd": (interface._flash_attn_varlen_backward, VARLEN),
}
RENAMED = {
    "p_dropout": "dropout_p",
    "is_causal": "causal",
    "is_rotary_interleaved": "rotary_interleaved",
}
WINDOW = ["window_size_left", "window_size_right", "softcap"]
SURFACE = {
    "fwd": [
        *("q", "k", "v", "out", "alibi_slopes", "p_dropout", "softmax_scale", "is_causal"),
        *(*WINDOW, "return_softmax", "gen"),
    ],
    "varlen_fwd": [
        *("q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k"),
        *("block_table", "alibi_slopes", "max_seqlen_q", "max_seqlen_k", "p_dropout"),
        *("softmax_scale", "zero_tensors", "is_causal", *WINDOW, "return_softmax", "gen"),
    ],
    "bwd": [
        *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "alibi_slopes"),
        *("p_dropout", "softmax_scale", "is_causal", *WINDOW, "deterministic", "gen", "rng_state"),
    ],
    "varlen_bwd": [
        *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q"),
        *("cu_seqlens_k", "alibi_slopes", "max_seqlen_q", "max_seqlen_k", "p_dropout"),
        *("softmax_scale", "zero_tensors", "is_causal", *WINDOW, "deterministic", "gen"),
        "rng_state",
    ],
    "fwd_kvcache": [
        *("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "rotary_cos", "rotary_sin"),
        *("cache_batch_idx", "cache_leftpad", "block_table", "alibi_slopes", "out"),
        *("softmax_scale", "is_causal", *WINDOW, "is_rotary_interleaved", "num_splits"),
    ],
}
entries = pytest.mark.parametrize("name", ENTRIES)


def call_for(name: str, device: torch.device) -> Arguments:
    """The call of the function behind an entry point, on the device."""
    function, problem = ENTRIES[name]
    call = harness.arguments_for(function, problem)
    return {x: y.to(device) if isinstance(y, Tensor) else y for x, y in call.items()}


def extension(name: str, call: Arguments, **changes) -> list[Tensor]:
    """The entry point under the call of the function behind it, by position as clients do."""
    values = [call.get(RENAMED.get(argument, argument)) for argument in SURFACE[name]]
    for argument, value in changes.items():
        values[SURFACE[name].index(argument)] = value
    answer = getattr(gpu, name)(*values)
    assert isinstance(answer, list)
    return answer


@pytest.mark.parametrize("name", SURFACE)
def test_argument_order_is_upstreams(name):
    assert list(inspect.signature(getattr(gpu, name)).parameters) == SURFACE[name]


@entries
def test_it_agrees_with_the_function_behind_it(device, name):
    function, problem = ENTRIES[name]
    call = call_for(name, device)
    answer = extension(name, call)
    names = ("out", "softmax_lse") if "fwd" in name else ("dq", "dk", "dv")
    expected = harness.truth(function, harness.arguments_for(function, problem))
    harness.assert_right(dict(zip(names, answer, strict=False)), expected)
    assert len(answer) == 4
    direct = function(**{x: call.get(x) for x in harness.parameters(function)})
    if "fwd" in name:
        assert all(torch.equal(x, y) for x, y in zip(answer, direct, strict=True))
    else:
        assert torch.equal(answer[3], direct)


@entries
def test_it_writes_where_it_is_told(device, name):
    call = call_for(name, device)
    names = ("out",) if "fwd" in name else ("dq", "dk", "dv")
    places = {x: torch.full_like(call["q" if x == "out" else x[1:]], torch.nan) for x in names}
    answer = extension(name, call, **places)
    plain = extension(name, call, **dict.fromkeys(places))
    for index, place in enumerate(places.values()):
        assert answer[index] is place
        assert torch.equal(place, plain[index])


@entries
def test_dropout_goes_through(device, name):
    if "fwd" in name:
        call = call_for(name, device) | {"dropout_p": P, "return_softmax": True}
        torch.manual_seed(1)
        ours = extension(name, call)
        torch.manual_seed(1)
        function = ENTRIES[name][0]
        theirs = function(**{x: call.get(x) for x in harness.parameters(function)})
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        assert ours[2].numel() > 0
        return
    call = call_for(name, device) | {"dropout_p": P}
    with pytest.raises(ArgumentError, match=r"^rng_state: "):
        extension(name, call)
    rng_state = extension(name.replace("bwd", "fwd"), call | {"return_softmax": True})[3]
    one, again = (
        extension(name, call, dq=None, dk=None, dv=None, rng_state=rng_state) for _ in "ab"
    )
    without = extension(name, call | {"dropout_p": 0.0}, dq=None, dk=None, dv=None)
    for index in range(3):
        assert torch.equal(one[index], again[index])
        assert not torch.equal(one[index], without[index])


@entries
def test_a_generator_is_refused(device, name):
    with pytest.raises(ArgumentError, match=r"^gen: .*manual_seed"):
        extension(name, call_for(name, device), gen=torch.Generator())


@pytest.mark.parametrize("more", [{}, {"seqused_k": (7, 6), "leftpad_k": (1, 2)}], ids=str)
def test_keys_in_pages_go_through(device, more):
    function, problem = ENTRIES["varlen_fwd"]
    call = harness.arguments_for(function, problem)
    call |= harness.in_pages(call) | {name: harness.int32(values) for name, values in more.items()}
    there = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in call.items()}
    answer = dict(zip(("out", "softmax_lse"), extension("varlen_fwd", there), strict=False))
    harness.assert_right(answer, harness.truth(function, call))


OVER_A_CACHE = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.3},
    "window": {"window_size": (4, 1), "softcap": 0.8},
    "rotary": {**cache.tables(torch.float16), "rotary_interleaved": False, "causal": True},
    "leftpad": {"cache_leftpad": harness.int32((2, 1))},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 1.0, cache.NHEADS)},
    "old keys only": {"k": None, "v": None},
}


def over_a_cache(call: Arguments, device: torch.device, **changes) -> cache.Answer:
    """The cache's entry point, under a call of `flash_attn_with_kvcache`."""
    there = {x: y.clone().to(device) if isinstance(y, Tensor) else y for x, y in call.items()}
    left, right = there["window_size"]
    there |= {"window_size_left": left, "window_size_right": right}
    out, lse = extension("fwd_kvcache", there, **changes)
    caches = {name: there[name] for name in ("k_cache", "v_cache")}
    return {"out": out, "softmax_lse": lse, **caches}


@pytest.mark.parametrize("options", OVER_A_CACHE.values(), ids=OVER_A_CACHE)
@pytest.mark.parametrize("layout", cache.SEQUENCE)
def test_the_cache_entry_point_agrees_with_the_function(device, layout, options):
    call = cache.arguments(layout, torch.float16) | options
    answer, direct = over_a_cache(call, device), cache.run(call, device)
    assert answer.keys() == direct.keys()
    assert all(torch.equal(answer[name], direct[name]) for name in answer)
    cache.assert_right(answer, call)


def test_the_cache_entry_point_takes_the_row_of_each_sequence(device):
    call = cache.arguments("rows", torch.float16, cache_batch_idx=harness.int32((2, 0)))
    cache.assert_right(over_a_cache(call, device), call)


@pytest.mark.parametrize("layout", cache.SEQUENCE)
def test_the_cache_entry_point_writes_where_it_is_told(device, layout):
    call = cache.arguments(layout, torch.float16, causal=True)
    place = torch.full_like(call["q"], torch.nan, device=device)
    answer = over_a_cache(call, device, out=place)
    assert answer["out"] is place
    cache.assert_right(answer, call)

"""What clients put in place of transformers' functions is asked while installed, in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("transformers")

Script = Callable[..., str]

PACKED = """
import sys
sys.modules["torch_npu"] = None     # not installed, as far as anybody can tell
import torch
torch.set_num_threads(1)
import flash_attn_npu

def packed_data(mask):
    # the recipe of packing: mask holds the number of the sequence that a token is of, 0 is padding
    batch, asked = mask.shape[0], []
    for row in mask.tolist():
        asked += [row.count(number) for number in range(1, max(row) + 1)]
    lengths = torch.tensor(asked, dtype=torch.int32)
    calls.append(mask)
    return (mask.flatten().nonzero().flatten(),
            torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            int(lengths.max()))

calls = []
MASK = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3, 3]])

def check(times=1):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *MASK.shape, 2, 8)
    got = None
    for _ in range(times):
        got = flash._flash_attention_forward(
            q, k, v, MASK, 8, True, attn_implementation="flash_attention_2")
    for row in range(len(MASK)):
        for number in range(1, int(MASK[row].max()) + 1):
            here = MASK[row] == number
            q1, k1, v1 = (x[row, here].double().transpose(0, 1) for x in (q, k, v))
            scores = q1 @ k1.mT / 8 ** 0.5
            scores += torch.full_like(scores, -torch.inf).triu(1)
            expected = (scores.softmax(-1) @ v1).transpose(0, 1)
            assert (got[row, here] - expected).abs().max() < 1e-6, (row, number)
    assert len(calls) == times, len(calls)

IMPORT, INSTALL, REPLACE = (
    "import transformers.modeling_flash_attention_utils as flash",
    "flash_attn_npu.install()",
    "flash._get_unpad_data = packed_data",
)
"""


@pytest.mark.parametrize(
    "order",
    ["INSTALL, IMPORT, REPLACE", "IMPORT, INSTALL, REPLACE", "IMPORT, REPLACE, INSTALL"],
)
def test_packing_recipes(script: Script, order: str) -> None:
    script(
        PACKED
        + f"""
for step in ({order}):
    exec(step)
check(2)
flash_attn_npu.uninstall()
assert flash._get_unpad_data is packed_data
with flash_attn_npu.install():
    calls.clear()
    check()
""",
        warnings="ignore",
    )


def test_every_name_that_a_hooked_function_asks(script: Script) -> None:
    """One process: each name replaced before and after install, then put back."""
    script(
        PACKED
        + """
import contextlib, inspect
exec(IMPORT)
from transformers.integrations import flash_attention, npu_flash_attention
q = torch.randn(2, 8, 2, 8)
keys = (MASK > 0).int()
half = keys.clone(); half[0, 6:] = 0
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])

@contextlib.contextmanager
def counted(module, name, order):
    # `name` counts its calls, replaced before or after installing
    original, count = getattr(module, name), []
    def counting(*args, **kwargs):
        count.append(args)
        return original(*args, **kwargs)
    if order == "before":
        setattr(module, name, counting)
    with flash_attn_npu.install():
        if order == "after":
            original = getattr(module, name)
            setattr(module, name, counting)
        yield count
    assert getattr(module, name) is counting, (name, order)
    setattr(module, name, stock[module, name])

def forward(mask=None, length=8, **kwargs):
    return flash._flash_attention_forward(
        q[:, :length] if mask is not None else q[:1], q if mask is not None else q[:1],
        q if mask is not None else q[:1], mask, length, True,
        attn_implementation="flash_attention_2", **kwargs)

ASKED = {
    (flash, "_get_unpad_data"): lambda: forward(half),
    (flash, "_index_first_axis"): lambda: forward(half),
    (flash, "_upad_input"): lambda: forward(half),
    (flash, "_unpad_input"): lambda: forward(half, 3),
    (flash, "_pad_input"): lambda: forward(half),
    (flash, "_lazy_imports"): lambda: forward(half),
    (flash, "_is_packed_sequence"): lambda: forward(position_ids=positions),
    (flash, "prepare_fa_kwargs_from_position_ids"): lambda: forward(position_ids=positions),
    (flash, "is_torch_npu_available"): lambda: forward(half),
    (flash_attention, "get_target_dtype"): lambda: flash_attention.flash_attention_forward(
        torch.nn.Module(), q, q, q, None, scaling=1.0, is_causal=True),
}
torch.nn.Module.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
stock = {place: getattr(*place) for place in ASKED}
for (module, name), use in ASKED.items():
    for order in ("before", "after"):
        with counted(module, name, order) as count:
            if name == "_lazy_imports" and order == "after":
                flash._loaded_implementation = None
            use()
            use()
            # these are asked once for each loading
            once = name in ("_lazy_imports", "is_torch_npu_available")
            assert len(count) >= (1 if once else 2), (name, order, count)
flash.is_flash_attn_2_available = lambda *args: False
with flash_attn_npu.install():
    try:
        forward(half)
    except ImportError as error:
        assert "kernels" in str(error)     # where transformers goes who has no flash_attn
    else:
        raise AssertionError

for name in ("npu_flash_attn_func", "npu_flash_attn_varlen_func", "npu_flash_attn_with_kvcache"):
    original = getattr(npu_flash_attention, name)
    setattr(npu_flash_attention, name, theirs := lambda *args: None)
    with flash_attn_npu.install():
        assert getattr(npu_flash_attention, name) is theirs
    setattr(npu_flash_attention, name, original)
    with flash_attn_npu.install():
        assert "s_aux" in inspect.signature(getattr(npu_flash_attention, name)).parameters
""",
        warnings="ignore",
    )


@pytest.mark.parametrize("order", ["import first", "install first"])
def test_a_replaced_flash_attn_func_is_what_transformers_loads(script: Script, order: str) -> None:
    script(
        PACKED
        + ("exec(IMPORT); exec(INSTALL)" if order == "import first" else "exec(INSTALL)")
        + """
import functools
import flash_attn
from flash_attn import bert_padding
from flash_attn_npu._integrations.stand_ins import STAND_INS
exec(IMPORT)

def wrapped(function):
    @functools.wraps(function)
    def replacement(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)
    return replacement

q = torch.randn(2, 8, 2, 8)
mask = (MASK > 0).int()
def forward(mask, length):
    return flash._flash_attention_forward(
        q[:, :length], q, q, mask, length, True, attn_implementation="flash_attention_2")
expected = forward(None, 8), forward(mask, 8), forward(mask, 3)
assert calls == []
assert flash._flash_fn is STAND_INS["flash_attn_func"]

names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
for module, names in ((flash_attn, names), (bert_padding, ("pad_input", "unpad_input"))):
    for name in names:
        setattr(module, name, wrapped(getattr(module, name)))
flash._loaded_implementation = None
for got, before in zip((forward(None, 8), forward(mask, 8), forward(mask, 3)), expected):
    assert torch.equal(got, before)
assert calls == [
    "flash_attn_func", "flash_attn_varlen_func", "pad_input", "unpad_input",
    "flash_attn_varlen_func", "pad_input"], calls
assert flash._flash_with_kvcache_fn is not STAND_INS["flash_attn_with_kvcache"]
""",
        warnings="ignore",
    )


def test_a_replaced_probe_stays_and_the_stock_one_gives_way_elsewhere(script: Script) -> None:
    script(
        PACKED
        + """
exec(IMPORT)
from transformers import utils
probes = utils.import_utils
stock = utils.is_flash_attn_2_available
probes.is_flash_attn_2_available = theirs = lambda *args: False
with flash_attn_npu.install():
    assert probes.is_flash_attn_2_available is theirs
    assert utils.is_flash_attn_2_available() and flash.is_flash_attn_2_available()
    assert flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["general_availability_check"]()
assert utils.is_flash_attn_2_available is flash.is_flash_attn_2_available is stock
assert probes.is_flash_attn_2_available is theirs
""",
        warnings="ignore",
    )


def test_gpt2_without_a_linear_layer_runs_in_float32(script: Script) -> None:
    script(
        PACKED
        + """
flash_attn_npu.install()
from transformers import GPT2Config, GPT2LMHeadModel
config = dict(n_embd=32, n_head=4, n_layer=2, vocab_size=50, attn_pdrop=0.0)

def gpt2(attention, dtype):
    torch.manual_seed(0)
    return GPT2LMHeadModel._from_config(
        GPT2Config(**config, attn_implementation=attention), dtype=dtype).eval()

ids, mask = torch.randint(50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
mask[0, :4] = 0
exact = gpt2("eager", torch.float64)(ids, attention_mask=mask).logits[mask.bool()]
theirs = gpt2("eager", torch.float32)(ids, attention_mask=mask).logits[mask.bool()]
ours = gpt2("flash_attention_2", torch.float32)(ids, attention_mask=mask).logits[mask.bool()]
assert ours.dtype == torch.float32
assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6
half = gpt2("flash_attention_2", torch.bfloat16)(ids, attention_mask=mask).logits
assert half.dtype == torch.bfloat16
def off(attention):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gpt2(attention, torch.float32)(ids, attention_mask=mask).logits[mask.bool()]
    return (mixed - exact).abs().max()
assert off("flash_attention_2") <= 2 * off("eager") + 1e-6
""",
        warnings="ignore",
    )


def test_an_instances_own_list_of_kernels_is_left_as_it_was(script: Script) -> None:
    script(
        PACKED
        + """
flash_attn_npu.install()
from transformers import GptOssConfig, GptOssForCausalLM
config = GptOssConfig(hidden_size=32, intermediate_size=32, vocab_size=50, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                      num_local_experts=2, num_experts_per_tok=1, pad_token_id=0)
model = GptOssForCausalLM._from_config(config, attn_implementation="eager")
kernel, name = "kernels-community/vllm-flash-attn3", "_compatible_flash_implementations"
adjust = model._check_and_adjust_attn_implementation
assert kernel in getattr(model, name) and name not in vars(model)
assert adjust("flash_attention_2") == "flash_attention_2"
assert name not in vars(model)
setattr(model, name, own := [kernel, "another"])
assert adjust("flash_attention_2") == "flash_attention_2"
assert vars(model)[name] is own and own == [kernel, "another"]
seen = []
def asked(self, *args):
    seen.append(getattr(self, name))
    raise RuntimeError("refused")
flash_attn_npu.uninstall()
from transformers import PreTrainedModel
PreTrainedModel._check_and_adjust_attn_implementation = asked
flash_attn_npu.install()
for implementation in ("flash_attention_2", "eager"):
    try:
        model._check_and_adjust_attn_implementation(implementation)
    except RuntimeError:
        pass
    assert vars(model)[name] is own
assert seen == [[kernel, "another", "flash_attention_2"], own]
flash_attn_npu.uninstall()
assert PreTrainedModel._check_and_adjust_attn_implementation is asked
""",
        warnings="ignore",
    )

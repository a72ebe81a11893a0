"""Unmodified transformers models on a machine without NPU, served by us while installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("transformers")

Script = Callable[..., str]

LAPTOP = """
import sys
sys.modules["torch_npu"] = None     # not installed, as far as anybody can tell
import flash_attn_npu
"""
MODELS = """
import logging, torch
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

SMALL = dict(hidden_size=64, intermediate_size=64, vocab_size=50, num_hidden_layers=3)

def bert(attention="flash_attention_2"):
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_attention_heads=4, attn_implementation=attention)
    return BertModel._from_config(config, dtype=torch.float32).eval()

def mistral(attention="flash_attention_2"):
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    return MistralForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation=attention).eval()

def batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 50, (3, 40)), torch.ones(3, 40, dtype=torch.int64)
    mask[0, :10], mask[1, :25] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)

def run(model, **inputs):
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        return model(**inputs)[0][kept]

def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()
"""


@pytest.mark.parametrize("order", ["install first", "transformers first", "models first"])
def test_models_equal_eager_attention(script: Script, order: str) -> None:
    before = {
        "install first": "flash_attn_npu.install()",
        "transformers first": "import transformers; flash_attn_npu.install()",
        "models first": "import transformers.models.mistral.modeling_mistral\n"
        "from transformers.utils import is_flash_attn_2_available as asked_before\n"
        "assert not asked_before()\n"
        "flash_attn_npu.install()",
    }[order]
    script(
        LAPTOP
        + before
        + MODELS
        + """
records = []
handler = logging.Handler(level=logging.WARNING)
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
for make in (bert, mistral):
    eager, flash = make("eager"), make()
    expected = run(eager, **batch())
    assert close(run(flash, **batch()), expected), make
    eager.set_attn_implementation("flash_attention_2")
    assert close(run(eager, **batch()), expected), make
    assert flash.config._attn_implementation == "flash_attention_2"
from flash_attn_npu._core.ground import usage
assert "flash_attn_varlen_func" in usage.summary()
assert not records, records
""",
        warnings="ignore",
    )


def test_generation_equals_eager_attention(script: Script) -> None:
    script(
        LAPTOP
        + "flash_attn_npu.install()"
        + MODELS
        + """
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
expected = mistral("eager").generate(**batch(), **options)
for cache in (None, "static"):
    got = mistral().generate(**batch(), **options, cache_implementation=cache)
    assert torch.equal(got, expected), cache
""",
        warnings="ignore",
    )


def test_training_equals_eager_attention(script: Script) -> None:
    script(
        LAPTOP
        + "flash_attn_npu.install()"
        + MODELS
        + """
def gradients(attention):
    model, inputs = mistral(attention), batch()
    # the first real token is predicted from padding, where the two kinds may differ
    real = inputs["attention_mask"].bool()
    real[:, 1:] &= real[:, :-1].clone()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    model(**inputs, labels=labels).loss.backward()
    return [parameter.grad for parameter in model.parameters()]

for mine, other in zip(gradients("flash_attention_2"), gradients("eager"), strict=True):
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max() + 1e-7
""",
        warnings="ignore",
    )


def test_clients_see_flash_attention_available(script: Script) -> None:
    script(
        LAPTOP
        + """
flash_attn_npu.install()
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
from transformers.utils.import_utils import is_flash_attn_3_available, is_flash_attn_4_available
assert is_flash_attn_2_available() and is_flash_attn_2_available(kernels_fallback_ok=True)
assert is_flash_attn_greater_or_equal("2.3.3")
assert not is_flash_attn_3_available() and not is_flash_attn_4_available()
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
assert not flash_attn_supports_top_left_mask()
from transformers.dynamic_module_utils import check_imports
import pathlib
code = pathlib.Path("remote.py")
code.write_text("from flash_attn import flash_attn_func\\n")
check_imports(code)
""",
        warnings="ignore",
    )


@pytest.mark.parametrize("order", ["install first", "transformers first"])
def test_uninstall_puts_transformers_back(script: Script, order: str) -> None:
    first = "flash_attn_npu.install()" if order == "install first" else "pass"
    script(
        LAPTOP
        + "import copy, importlib\n"
        + first
        + MODELS
        + """
import transformers
names = ("utils", "utils.import_utils", "modeling_flash_attention_utils", "modeling_utils",
         "integrations.npu_flash_attention", "integrations.flash_attention")
modules = [importlib.import_module(f"transformers.{name}") for name in names]
loggers = [logging.getLogger(module.__name__) for module in modules]
flash = modules[2]

def state():
    attributes = [dict(vars(module)) for module in modules]
    matrix = getattr(flash, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {2: {}})
    return attributes, copy.copy(matrix[2]), [list(logger.filters) for logger in loggers]

before = state()
if flash_attn_npu.installed():
    run(bert(), **batch())
    flash_attn_npu.uninstall()
else:
    with flash_attn_npu.install():
        assert state() != before
        run(bert(), **batch())
    assert state() == before

for module in modules:
    for name, value in vars(module).items():
        assert not str(getattr(value, "__module__", "")).startswith("flash_attn_npu"), name
assert not any(logger.filters for logger in loggers)
assert flash.is_flash_attn_2_available is modules[1].is_flash_attn_2_available
assert not flash.is_flash_attn_2_available()
mapping = getattr(modules[1], "_package_distribution_mapping", dict)()
assert "flash_attn" not in mapping
try:
    bert()
except ImportError as error:
    assert "seem" in str(error) and "installed" in str(error)
else:
    raise AssertionError("flash attention is still there")
with flash_attn_npu.install():
    assert close(run(bert(), **batch()), run(bert("eager"), **batch()))
""",
        warnings="ignore",
    )


def test_the_functions_of_transformers_own_npu_path(script: Script) -> None:
    script(
        LAPTOP
        + """
import inspect
flash_attn_npu.install()
import torch
from transformers.integrations import npu_flash_attention as theirs
from transformers.modeling_flash_attention_utils import _lazy_define_process_function
dense, varlen = theirs.npu_flash_attn_func, theirs.npu_flash_attn_varlen_func
supported = _lazy_define_process_function(varlen).keywords["supports_mapping"]
named = {"dropout_p", "window_size", "deterministic", "softcap", "s_aux", "max_seqlen_q",
         "max_seqlen_k"}
assert {name for name in named if supported[name]} == named
for function in (dense, varlen):
    assert {"softmax_scale", "causal", "alibi_slopes"} <= set(
        inspect.signature(function).parameters)

q = torch.randn(2, 5, 2, 8)
cu = torch.tensor([0, 5, 10], dtype=torch.int32)
flat = q.flatten(0, 1)
one = dense(q, q, q, causal=True, window_size=(2, 2))
two = varlen(flat, flat, flat, cu, cu, causal=True, window_size=(2, 2))
assert torch.allclose(one.flatten(0, 1), two, atol=1e-6)

# a sink takes the share exp(sink) / (exp(lse) + exp(sink)) of every row, and gives nothing
sink = torch.tensor([0.5, -1.0])
plain, lse, _ = flash_attn_npu.flash_attn_func(q, q, q, return_attn_probs=True)
expected = plain * torch.sigmoid(lse.transpose(1, 2) - sink)[..., None]
assert torch.allclose(dense(q, q, q, s_aux=sink), expected, atol=1e-6)
packed = varlen(flat, flat, flat, cu, cu, 5, 5, s_aux=sink)
assert torch.allclose(packed, expected.flatten(0, 1), atol=1e-6)
""",
        warnings="ignore",
    )


def test_a_client_replacement_made_after_ours_survives(script: Script) -> None:
    script(
        LAPTOP
        + """
import transformers.modeling_flash_attention_utils as flash
with flash_attn_npu.install():
    flash._upad_input = replacement = lambda *args: None
assert flash._upad_input is replacement
""",
        warnings="ignore",
    )


def test_a_transformers_that_lacks_a_name_loses_what_hangs_on_it_and_no_more(
    script: Script,
) -> None:
    out = script(
        LAPTOP
        + """
logging = __import__("logging")
logging.basicConfig(stream=sys.stdout)
import transformers.modeling_flash_attention_utils as flash
del flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX, flash._is_packed_sequence
theirs, flash._upad_input = flash._upad_input, lambda q, k, v, mask, length: None
before = dict(vars(flash))
with flash_attn_npu.install():
    assert flash._upad_input is before["_upad_input"]
    assert flash._lazy_imports is not before["_lazy_imports"]
assert flash._lazy_imports is before["_lazy_imports"]
""",
        warnings="ignore",
    )
    told = [line for line in out.splitlines() if line.startswith("WARNING:flash_attn_npu")]
    assert len(told) == 1
    assert "_upad_input" in told[0]


def test_a_model_whose_argument_would_be_dropped_is_refused(script: Script) -> None:
    """Versions to come, which pass no sink on, take functions of their own, or are all new."""
    script(
        LAPTOP
        + MODELS
        + """
import inspect
import transformers.modeling_flash_attention_utils as flash
from transformers import GptOssConfig, GptOssForCausalLM
from flash_attn_npu.errors import UnsupportedError

def passes_no_sink():
    process = flash._process_flash_attention_kwargs
    taken = dict(inspect.signature(process).parameters)
    del taken["s_aux"]
    process.__signature__ = inspect.Signature(list(taken.values()))

def takes_its_own():
    flash._import = flash.__dict__.pop("_lazy_imports")
    function = flash.lazy_import_flash_attention
    names = tuple(
        "_import" if name == "_lazy_imports" else name for name in function.__code__.co_names)
    function.__code__ = function.__code__.replace(co_names=names)

def is_all_new():
    del flash._flash_attention_forward

small = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2)
config = GptOssConfig(**SMALL | small, num_experts_per_tok=1)
for change in (passes_no_sink, takes_its_own, is_all_new):
    before, code = dict(vars(flash)), flash.lazy_import_flash_attention.__code__
    change()
    with flash_attn_npu.install():
        try:
            run(GptOssForCausalLM._from_config(
                config, dtype=torch.float32, attn_implementation="flash_attention_2").eval(),
                **batch())
        except UnsupportedError as error:
            assert error.argument == "s_aux" and "transformers" in str(error), error
        else:
            raise AssertionError(change)
        # what does not use it is served
        assert close(run(bert(), **batch()), run(bert("eager"), **batch())), change
    vars(flash).update(before)
    vars(flash._process_flash_attention_kwargs).pop("__signature__", None)
    flash.lazy_import_flash_attention.__code__ = code
""",
        warnings="ignore",
    )


def test_install_does_not_import_transformers(script: Script) -> None:
    script(LAPTOP + "flash_attn_npu.install()\nassert 'transformers' not in sys.modules\n")

"""transformers' flash_attention_2, served by this package.

transformers never calls `flash_attn` on an Ascend machine: it has functions of its own, which
drop sliding windows and attention sinks without a word. On a machine without accelerator it
refuses flash attention altogether. The hooks below change module attributes of transformers
as far as needed, when its modules are imported or at once if they already are, and undo it.
transformers itself is never imported from here.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch

from .. import bert_padding, flash_attn_interface
from .._core.ground.memory import forget_lengths
from .changes import Changes
from .stand_ins import STAND_INS
from .unpadding import memoised_upad_input, once_per_tensor
from .untouched import loaded, namespace

__all__ = ["HOOKS", "forget_cached_answers", "undo"]

_log = logging.getLogger("flash_attn_npu")
_changes = Changes()

_PROBES = "transformers.utils.import_utils"
_PROBE = "is_flash_attn_2_available"
_FLASH = "transformers.modeling_flash_attention_utils"
_MATRIX = "FLASH_ATTENTION_COMPATIBILITY_MATRIX"
_NPU = "transformers.integrations.npu_flash_attention"
_FORWARD = "transformers.integrations.flash_attention"
_TARGET = "get_target_dtype"
_READ_IN_EVERY_LAYER = ("prepare_fa_kwargs_from_position_ids", "_is_packed_sequence")
_MODELS = "transformers.modeling_utils"
_ADJUST = "_check_and_adjust_attn_implementation"
_COMPATIBLE = "_compatible_flash_implementations"
_SINK_KERNEL = "kernels-community/vllm-flash-attn3"
_LOADED = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


def undo() -> None:
    """Put back everything the hooks changed; called again, what a call before it has not."""
    try:
        _changes.undo()
    finally:
        forget_lengths()


def forget_cached_answers() -> None:
    """Make transformers look again for distributions and flash attention.

    It asks once per process, so answers from before a change of ours would stay.
    """
    for name in (
        "_package_distribution_mapping",
        "is_flash_attn_2_available",
        "is_flash_attn_3_available",
        "is_flash_attn_4_available",
        "is_flash_attn_greater_or_equal",
    ):
        clear = getattr(loaded(_PROBES).get(name), "cache_clear", None)
        if clear is not None:
            clear()


def _on_probes(module: ModuleType) -> None:
    if not _has(module, _PROBE):
        return
    # somebody may have replaced it here; others hold transformers' own all the same
    for original in (module, *list(sys.modules.values())):
        probe = namespace(original).get(_PROBE)
        if isinstance(probe, _CACHED) and _defines(module, probe.__wrapped__):
            _changes.before(functools.partial(_replace_probe, _available, probe))
            _replace_probe(probe, _available)
            return


def _on_flash(module: ModuleType) -> None:
    if not _has(module, "_upad_input", "_lazy_imports", _MATRIX):
        return
    _changes.before(functools.partial(_forget_loaded, module))
    _forget_loaded(module)
    _stand_in(module, "_upad_input", functools.partial(_short_upad_input, module))
    for name in _READ_IN_EVERY_LAYER:
        if hasattr(module, name):
            _stand_in(module, name, once_per_tensor)
    _stand_in(module, "_lazy_imports", functools.partial(_lazy_imports_with_ours, module))
    checks = getattr(module, _MATRIX)[2]
    _changes.set(checks, "supported_devices", (*checks["supported_devices"], _ON_CPU))
    for name in (_FLASH, _MODELS):
        logger, untrue = logging.getLogger(name), _UntrueHere()
        _changes.before(functools.partial(logger.removeFilter, untrue))
        logger.addFilter(untrue)


def _on_forward(module: ModuleType) -> None:
    if _has(module, _TARGET):
        # whoever may have replaced it is asked first, and theirs may ask transformers' own
        _changes.set(vars(module), _TARGET, _target_without_linear(getattr(module, _TARGET)))


def _on_npu(module: ModuleType) -> None:
    for name, ours in STAND_INS.items():
        if _has(module, f"npu_{name}"):
            _stand_in(module, f"npu_{name}", functools.partial(_instead, ours))


def _on_models(module: ModuleType) -> None:
    """Let models with attention sinks keep flash_attention_2, which serves them now.

    transformers sends them to a hub kernel, which neither Ascend nor a CPU can load.
    """
    base = getattr(module, "PreTrainedModel", None)
    original = getattr(base, _ADJUST, None)
    if base is None or original is None:
        return

    @functools.wraps(original)
    def adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        listed = getattr(self, _COMPATIBLE, None) or ()
        if attn_implementation != "flash_attention_2" or _SINK_KERNEL not in listed:
            return original(self, attn_implementation, *args, **kwargs)
        own = dict(vars(self))
        vars(self)[_COMPATIBLE] = [*listed, attn_implementation]
        try:
            return original(self, attn_implementation, *args, **kwargs)
        finally:
            del vars(self)[_COMPATIBLE]
            if _COMPATIBLE in own:
                vars(self)[_COMPATIBLE] = own[_COMPATIBLE]

    def restore() -> None:
        # somebody who replaced it after us keeps their replacement
        if vars(base).get(_ADJUST) is adjust:
            setattr(base, _ADJUST, original)

    _changes.before(restore)
    setattr(base, _ADJUST, adjust)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    _PROBES: _on_probes,
    _FLASH: _on_flash,
    _FORWARD: _on_forward,
    _NPU: _on_npu,
    _MODELS: _on_models,
}
"""Module of transformers -> what to do with it once it is imported."""


_ON_CPU = (lambda: True, "cpu")


@functools.cache
def _available(kernels_fallback_ok: bool = False) -> bool:
    """`is_flash_attn_2_available`: while installed, yes, whatever the device."""
    return True


_CACHED = type(_available)


def _instead(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return ours


def _short_upad_input(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """`_upad_input`, short while each function that transformers' own would ask is nobody else's.

    Packing recipes replace `_get_unpad_data`.
    """
    short = memoised_upad_input(original)

    @functools.wraps(original)
    def _upad_input(
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor,
        query_length: int,
        unpad_input_func: Callable[..., Any],
    ) -> Any:
        asked = (vars(module).get("_get_unpad_data"), vars(module).get("_index_first_axis"))
        untouched = all(_defines(module, function) for function in asked) and (
            _defines(module, unpad_input_func) or _defines(bert_padding, unpad_input_func)
        )
        upad = short if untouched else original
        return upad(
            query_layer, key_layer, value_layer, attention_mask, query_length, unpad_input_func
        )

    return _upad_input


def _lazy_imports_with_ours(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if (
            implementation != "flash_attention_2"
            or module.is_torch_npu_available()
            or not module.is_flash_attn_2_available()
        ):
            return original(implementation, *args, **kwargs)
        # off Ascend transformers would take these, whose signatures have no sink
        attention = [_taken("flash_attn", name, ours) for name, ours in STAND_INS.items()]
        pad = _taken("flash_attn.bert_padding", "pad_input", module._pad_input)
        unpad = _taken("flash_attn.bert_padding", "unpad_input", module._unpad_input)
        return (*attention, pad, unpad)

    return _lazy_imports


def _taken(package: str, name: str, instead: Callable[..., Any]) -> Any:
    """What a client has set as `package.name`, and `instead` of our own function there."""
    found = getattr(importlib.import_module(package), name)
    own = any(_defines(ours, found) for ours in (flash_attn_interface, bert_padding))
    return instead if own else found


def _target_without_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_target_dtype`, which looks for an nn.Linear, and GPT-2 has none."""

    @functools.wraps(original)
    def get_target_dtype(query: torch.Tensor, module: torch.nn.Module) -> torch.dtype | None:
        try:
            return cast("torch.dtype | None", original(query, module))
        except StopIteration:
            return next((weight.dtype for weight in module.parameters()), query.dtype)

    return get_target_dtype


def _stand_in(
    module: ModuleType, name: str, made_from: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace a function of transformers, unless somebody has done so before us."""
    original = vars(module)[name]
    if _defines(module, original):
        _changes.set(vars(module), name, made_from(original))
    else:
        _log.info("%s.%s is not transformers' own: it is left as it is", module.__name__, name)


def _defines(module: ModuleType, function: object) -> bool:
    """Whether `function` comes from the file of `module`, and not from whoever replaced it."""
    return getattr(function, "__globals__", None) is vars(module)


class _UntrueHere(logging.Filter):
    """Drops warnings of transformers that are false while this package serves."""

    MESSAGES = (
        "Flash Attention 2 only supports torch.float16 and torch.bfloat16 dtypes",
        "Casting fp32 inputs back to torch.float32 for flash-attn compatibility",
        "moving it to GPU, e.g. with `model.to('cpu')`",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.MESSAGES)


def _forget_loaded(module: ModuleType) -> None:
    for name in _LOADED:
        if hasattr(module, name):
            setattr(module, name, None)


def _has(module: ModuleType, *names: str) -> bool:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        _log.warning(
            "%s of transformers %s has no %s, which flash_attn_npu would have to replace: that "
            "part is left as it is; use transformers 5.20 to 5.x, or call flash_attn_npu directly",
            module.__name__,
            loaded("transformers").get("__version__", "(unknown)"),
            ", ".join(missing),
        )
    return not missing


def _replace_probe(old: object, new: object) -> None:
    # whoever imported the probe by name holds it: modules, and one table
    for module in list(sys.modules.values()):
        held = namespace(module)
        if held.get(_PROBE) is old:
            held[_PROBE] = new
    checks = loaded(_FLASH).get(_MATRIX, {}).get(2, {})
    if checks.get("general_availability_check") is old:
        checks["general_availability_check"] = new

"""transformers' flash_attention_2, served by this package.

transformers never calls `flash_attn` on an Ascend machine: it has functions of its own, which
drop sliding windows and attention sinks without a word. On a machine without accelerator it
refuses flash attention altogether. The hooks below change module attributes of transformers
as far as needed, when its modules are imported or at once if they already are, and undo it.
Each hook asks for what it needs and for nothing else, so that a version without one name loses
no more than what hangs on it. transformers itself is never imported from here.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch

from .. import bert_padding, flash_attn_interface
from .._core.ground.memory import forget_lengths
from . import models
from .cross_attention import forward_with_all_queries
from .replacing import changes, defines, everywhere, is_function_of, lacks, stand_in, swap
from .stand_ins import STAND_INS, npu_flash_attn_varlen_func
from .unpadding import counted, once_per_tensor, short_upad_input
from .untouched import loaded, namespace

__all__ = ["HOOKS", "forget_cached_answers", "undo"]

_PROBES = "transformers.utils.import_utils"
_PROBE = "is_flash_attn_2_available"
_FLASH = "transformers.modeling_flash_attention_utils"
_MATRIX = "FLASH_ATTENTION_COMPATIBILITY_MATRIX"
_NPU = "transformers.integrations.npu_flash_attention"
_FORWARD = "transformers.integrations.flash_attention"
_PAGED = "transformers.integrations.flash_paged"
_TARGET = "get_target_dtype"
_MASKS = "transformers.masking_utils"
_VISION = "transformers.vision_utils"
_BATCHING = (
    "transformers.generation.continuous_batching.utils",
    "transformers.generation.continuous_batching.requests",
)
_READ_IN_EVERY_LAYER = ("prepare_fa_kwargs_from_position_ids", "_is_packed_sequence")
_MODELS = "transformers.modeling_utils"
_SEMANTIC = ("s_aux", "softcap", "sliding_window")
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
        changes.undo()
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
    if not hasattr(module, _PROBE):
        lacks(module, _PROBE, "without accelerator it will not find flash attention")
        return
    # somebody may have replaced it here; others hold transformers' own all the same
    for original in (module, *list(sys.modules.values())):
        probe = namespace(original).get(_PROBE)
        if defines(module, probe.__wrapped__ if isinstance(probe, _CACHED) else probe):
            swap(_PROBE, probe, _available)
            return


def _on_flash(module: ModuleType) -> None:
    changes.before(functools.partial(_forget_loaded, module))
    _forget_loaded(module)
    unserved = _unserved(module)
    if is_function_of(module, "_upad_input", "unpad_input_func"):
        stand_in(module, "_upad_input", functools.partial(short_upad_input, module))
    else:
        lacks(module, "_upad_input", "padding is read again in every layer")
    for name in _READ_IN_EVERY_LAYER:
        if hasattr(module, name):
            stand_in(module, name, once_per_tensor)
    if hasattr(module, "_lazy_imports"):
        stand_in(module, "_lazy_imports", functools.partial(_lazy_imports_with_ours, module))
    if is_function_of(module, "_flash_attention_forward", "is_causal", "attention_mask"):
        everywhere(
            module,
            "_flash_attention_forward",
            functools.partial(forward_with_all_queries, module, unserved),
        )
    else:
        models.refused.update(_SEMANTIC)
        changes.before(models.refused.clear)
        lacks(
            module, "_flash_attention_forward", "models with a window, softcap or sink are refused"
        )
    checks = getattr(module, _MATRIX, {}).get(2)
    if checks is not None:
        changes.set(checks, "supported_devices", (*checks["supported_devices"], _ON_CPU))
    for name in (_FLASH, _MODELS):
        logger, untrue = logging.getLogger(name), _UntrueHere()
        changes.before(functools.partial(logger.removeFilter, untrue))
        logger.addFilter(untrue)


def _unserved(module: ModuleType) -> frozenset[str]:
    """Arguments that this version would not pass on to the functions we give it."""
    passes = vars(module).get("_process_flash_attention_kwargs")
    passes = passes or vars(module).get("_flash_attention_forward")
    taken = inspect.signature(passes).parameters if callable(passes) else {}
    unserved = {name for name in _SEMANTIC if name not in taken}
    if not hasattr(module, "_lazy_imports"):
        # it takes the functions of flash_attn itself, whose signatures have no sink
        unserved.add("s_aux")
    if not hasattr(module, "_process_flash_attention_kwargs"):
        lacks(
            module,
            "_process_flash_attention_kwargs",
            "4.51 hands windows on one wider than eager's",
        )
    for name in sorted(unserved):
        lacks(module, f"way for {name}", "models that use it are refused")
    return frozenset(unserved)


def _on_forward(module: ModuleType) -> None:
    if hasattr(module, _TARGET):
        # whoever may have replaced it is asked first, and theirs may ask transformers' own
        changes.set(vars(module), _TARGET, _target_without_linear(getattr(module, _TARGET)))


def _on_npu(module: ModuleType) -> None:
    for name, ours in STAND_INS.items():
        if hasattr(module, f"npu_{name}"):
            stand_in(module, f"npu_{name}", functools.partial(_instead, ours))


def _on_paged(module: ModuleType) -> None:
    """transformers 4.5x, whose paged attention takes its function at import."""
    taken = vars(module).get("FLASH_ATTN_VARLEN_FUNC")
    if taken is None:
        return
    if defines(module, taken) or defines(flash_attn_interface, taken):
        changes.set(vars(module), "FLASH_ATTN_VARLEN_FUNC", npu_flash_attn_varlen_func)
    everywhere(module, "paged_attention_forward", models.paged_without_softcap)


def _on_masks(module: ModuleType) -> None:
    if is_function_of(module, "flash_attention_mask", "kv_length", "attention_mask"):
        everywhere(module, "flash_attention_mask", _mask_of_static_cache)


def _on_vision(module: ModuleType) -> None:
    for name in ("get_vision_cu_seqlens", "get_vision_window_index"):
        if hasattr(module, name):
            everywhere(module, name, counted)


def _on_memory(module: ModuleType) -> None:
    name = "get_device_and_memory_breakdown"
    if hasattr(module, name):
        everywhere(module, name, models.memory_of_the_card)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    _PROBES: _on_probes,
    _FLASH: _on_flash,
    _FORWARD: _on_forward,
    _NPU: _on_npu,
    _PAGED: _on_paged,
    _MASKS: _on_masks,
    _VISION: _on_vision,
    _MODELS: models.on_models,
    **dict.fromkeys(_BATCHING, _on_memory),
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


def _lazy_imports_with_ours(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _lazy_imports(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return tuple(_instead_of_the_mirror(module, function) for function in found)

    return _lazy_imports


def _instead_of_the_mirror(module: ModuleType, function: Any) -> Any:
    """What serves for `function`, if it is our own: the mirror's signatures have no sink."""
    name = getattr(function, "__name__", None)
    if defines(flash_attn_interface, function):
        return STAND_INS.get(str(name), function)
    if defines(bert_padding, function):
        return vars(module).get(f"_{name}", function)
    return function


def _mask_of_static_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """`flash_attention_mask`, which says so when the keys are more than have been seen.

    transformers 4.57 and 5.20 drop a mask without padding, and then read what a static cache has
    not been given yet.
    """

    @functools.wraps(original)
    def flash_attention_mask(*args: Any, **kwargs: Any) -> Any:
        mask = original(*args, **kwargs)
        if mask is not None or torch.compiler.is_compiling() or "kv_length" not in kwargs:
            return mask
        given, keys = kwargs.get("attention_mask"), kwargs["kv_length"]
        if given is not None:
            return given if given.shape[-1] < keys else None
        # attention to another sequence has more keys than queries, and is no cache's business
        if "q_offset" not in kwargs or "allow_is_bidirectional_skip" in kwargs:
            return None
        seen = int(kwargs["q_offset"]) + kwargs["q_length"] - int(kwargs.get("kv_offset", 0))
        if seen >= keys:
            return None
        device = kwargs.get("device", getattr(kwargs["q_offset"], "device", None))
        return torch.ones(kwargs["batch_size"], seen, dtype=torch.bool, device=device)

    return counted(flash_attention_mask)


def _target_without_linear(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_target_dtype`, which looks for an nn.Linear, and GPT-2 has none."""

    @functools.wraps(original)
    def get_target_dtype(query: torch.Tensor, module: torch.nn.Module) -> torch.dtype | None:
        try:
            return cast("torch.dtype | None", original(query, module))
        except StopIteration:
            return next((weight.dtype for weight in module.parameters()), query.dtype)

    return get_target_dtype


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

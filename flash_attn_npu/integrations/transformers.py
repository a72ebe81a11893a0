"""transformers' flash_attention_2, served by this package.

transformers never calls `flash_attn` on an Ascend machine: it has functions of its own, which
drop sliding windows and attention sinks without a word. On a machine without accelerator it
refuses flash attention altogether. The hooks below change module attributes of transformers
as far as needed, when its modules are imported or at once if they already are, and undo it.
transformers itself is never imported from here.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any, cast

import torch

from .. import flash_attn_interface
from ..attention import call
from ..attention.lengths import host_lengths
from ..errors import UnsupportedError, explain
from ..memory import forget_lengths
from .unpadding import memoised_upad_input, once_per_tensor

__all__ = ["HOOKS", "forget_cached_answers", "undo"]

_log = logging.getLogger("flash_attn_npu")
_undo = ExitStack()

_PROBES = "transformers.utils.import_utils"
_PROBE = "is_flash_attn_2_available"
_FLASH = "transformers.modeling_flash_attention_utils"
_MATRIX = "FLASH_ATTENTION_COMPATIBILITY_MATRIX"
_NPU = "transformers.integrations.npu_flash_attention"
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


def npu_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_func` as transformers calls it; `s_aux` is an attention sink, (nheads,)."""
    # fmt: off
    if s_aux is None:
        out = flash_attn_interface.flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic,
        )
    else:
        out = call.attend(
            "npu_flash_attn_func", False, q, k, v, None, None, None, None, dropout_p, softmax_scale,
            causal, window_size, softcap, alibi_slopes, deterministic, False, s_aux,
        )
    # fmt: on
    return cast(torch.Tensor, out)


def npu_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_varlen_func` as transformers calls it: it reads this signature.

    What the signature does not name, transformers drops without a word. `max_seqlen_*` may be
    left out, as with transformers' own function.
    """
    if max_seqlen_q is None:
        max_seqlen_q = host_lengths("cu_seqlens_q", cu_seqlens_q).longest
    if max_seqlen_k is None:
        max_seqlen_k = host_lengths("cu_seqlens_k", cu_seqlens_k).longest
    # fmt: off
    if s_aux is None:
        out = flash_attn_interface.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        )
    else:
        out = call.attend(
            "npu_flash_attn_varlen_func", True, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, False, s_aux,
        )
    # fmt: on
    return cast(torch.Tensor, out)


def npu_flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_with_kvcache` as transformers' continuous batching calls it."""
    if s_aux is not None:
        raise UnsupportedError(
            explain(
                "s_aux",
                f"an attention sink of shape {tuple(s_aux.shape)}",
                "None: sinks are not served over a paged cache yet",
                'generate without continuous batching, or with attn_implementation="eager"',
            )
        )
    out = flash_attn_interface.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return cast(torch.Tensor, out)


def undo() -> None:
    """Put back everything the hooks changed."""
    _undo.close()
    forget_lengths()


def forget_cached_answers() -> None:
    """Make transformers look again for distributions and flash attention.

    It asks once per process, so answers from before a change of ours would stay.
    """
    module = sys.modules.get(_PROBES)
    for name in (
        "_package_distribution_mapping",
        "is_flash_attn_2_available",
        "is_flash_attn_3_available",
        "is_flash_attn_4_available",
        "is_flash_attn_greater_or_equal",
    ):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _on_probes(module: ModuleType) -> None:
    if _has(module, _PROBE):
        original = getattr(module, _PROBE)
        _replace_probe(original, _available)
        _undo.callback(_replace_probe, _available, original)


def _on_flash(module: ModuleType) -> None:
    if not _has(module, "_upad_input", "_lazy_imports", _MATRIX):
        return
    _forget_loaded(module)
    _undo.callback(_forget_loaded, module)
    _set_attribute(module, "_upad_input", memoised_upad_input(module._upad_input))
    for name in _READ_IN_EVERY_LAYER:
        if hasattr(module, name):
            _set_attribute(module, name, once_per_tensor(getattr(module, name)))
    _set_attribute(module, "_lazy_imports", _lazy_imports_with_ours(module))
    checks = getattr(module, _MATRIX)[2]
    _set_item(checks, "supported_devices", (*checks["supported_devices"], (lambda: True, "cpu")))
    for name in (_FLASH, _MODELS):
        logger, untrue = logging.getLogger(name), _UntrueHere()
        logger.addFilter(untrue)
        _undo.callback(logger.removeFilter, untrue)


def _on_npu(module: ModuleType) -> None:
    for ours in (npu_flash_attn_func, npu_flash_attn_varlen_func, npu_flash_attn_with_kvcache):
        if _has(module, ours.__name__):
            _set_attribute(module, ours.__name__, ours)


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

    setattr(base, _ADJUST, adjust)
    _undo.callback(restore)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    _PROBES: _on_probes,
    _FLASH: _on_flash,
    _NPU: _on_npu,
    _MODELS: _on_models,
}
"""Module of transformers -> what to do with it once it is imported."""


@functools.cache
def _available(kernels_fallback_ok: bool = False) -> bool:
    """`is_flash_attn_2_available`: while installed, yes, whatever the device."""
    return True


def _lazy_imports_with_ours(module: ModuleType) -> Callable[..., Any]:
    original = module._lazy_imports

    def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        # off Ascend transformers would take the bare functions, whose signatures have no sink
        if implementation != "flash_attention_2" or module.is_torch_npu_available():
            return original(implementation, *args, **kwargs)
        attention = (npu_flash_attn_func, npu_flash_attn_varlen_func, npu_flash_attn_with_kvcache)
        return (*attention, module._pad_input, module._unpad_input)

    return _lazy_imports


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
            getattr(sys.modules.get("transformers"), "__version__", "(unknown)"),
            ", ".join(missing),
        )
    return not missing


def _set_attribute(owner: ModuleType, name: str, value: object) -> None:
    _set_item(vars(owner), name, value)


def _set_item(mapping: MutableMapping[str, Any], key: str, value: object) -> None:
    _undo.callback(_put_back, mapping, key, value, mapping[key])
    mapping[key] = value


def _put_back(mapping: MutableMapping[str, Any], key: str, ours: object, old: object) -> None:
    # somebody who replaced it after us keeps their replacement
    if mapping.get(key) is ours:
        mapping[key] = old


def _replace_probe(old: object, new: object) -> None:
    # whoever imported the probe by name holds it: modules, and one table
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict) and namespace.get(_PROBE) is old:
            namespace[_PROBE] = new
    checks = getattr(sys.modules.get(_FLASH), _MATRIX, {}).get(2, {})
    if checks.get("general_availability_check") is old:
        checks["general_availability_check"] = new

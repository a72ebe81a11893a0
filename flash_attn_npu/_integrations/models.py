"""Which attention a model of transformers may be given, and when it is better refused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..errors import UnsupportedError
from .replacing import lacks, method
from .untouched import loaded

__all__ = ["memory_of_the_card", "on_models", "paged_without_softcap", "refused"]

_log = logging.getLogger("flash_attn_npu")

_ADJUST = "_check_and_adjust_attn_implementation"
_COMPATIBLE = "_compatible_flash_implementations"
_DISPATCH = "_flash_attn_2_can_dispatch"
_WITH_SINKS = {
    "kernels-community/vllm-flash-attn3",
    "kernels-community/flash-attn3",
    "kernels-community/flash-attn4",
    "flash_attention_3",
    "flash_attention_4",
}
"""What transformers sends a model to because of its sinks: flash_attention_2 has them here."""

refused: set[str] = set()
"""Arguments that a version keeps from us where no call can tell: the configuration is asked."""

_IN_CONFIG = {
    "sliding_window": ("sliding_window",),
    "softcap": ("attn_logit_softcapping",),
    "s_aux": ("attention_sink", "add_swa_attention_sink_bias"),
}


LOST = {
    "aimv2_text_model": "that its attention is causal",
    "gemma3": "that the tokens of an image see each other both ways",
    "gpt_neo": "the window of its local layers",
    "paligemma": "that the tokens of an image see each other both ways",
    "pegasus_x": "that its decoder is causal",
    "phimoe": "its sliding window",
    "t5gemma_module": "one position at each side of its encoder's window",
}
"""What transformers 5.24 does not hand to flash attention, whoever serves it, by `model_type`."""

_told: set[str] = set()


def on_models(module: ModuleType) -> None:
    """Let models keep flash_attention_2 where it serves them, and refuse what nothing serves."""
    base = getattr(module, "PreTrainedModel", None)
    if base is None or _ADJUST not in vars(base):
        lacks(module, _ADJUST, "models with attention sinks may be sent to another kernel")
    else:
        method(base, _ADJUST, functools.partial(_adjust, module))
    if base is not None and _DISPATCH in vars(base):
        method(base, _DISPATCH, _wherever_the_model_lies)


def _adjust(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation is None or "flash_attention_2" not in attn_implementation:
            found = original(self, attn_implementation, *args, **kwargs)
        else:
            _refuse(self)
            _tell_what_is_lost(self.config)
            found = _with_flash_attention_2(original, self, attn_implementation, *args, **kwargs)
        _require_registered(module, found)
        return found

    return adjust


def _with_flash_attention_2(
    original: Callable[..., Any], model: Any, attn_implementation: str, *args: Any, **kwargs: Any
) -> Any:
    listed = getattr(model, _COMPATIBLE, None) or ()
    if not _WITH_SINKS.intersection(listed):
        return original(model, attn_implementation, *args, **kwargs)
    own = dict(vars(model))
    vars(model)[_COMPATIBLE] = [*listed, "flash_attention_2"]
    try:
        return original(model, attn_implementation, *args, **kwargs)
    finally:
        del vars(model)[_COMPATIBLE]
        if _COMPATIBLE in own:
            vars(model)[_COMPATIBLE] = own[_COMPATIBLE]


def _require_registered(module: ModuleType, found: Any) -> None:
    """Refuse a kernel of the hub that was not loaded: the first forward would not find it.

    On Ascend transformers takes its own functions whatever kernel was asked for, and registers
    nothing under the kernel's name.
    """
    known = getattr(getattr(module, "AttentionInterface", None), "_global_mapping", None)
    if known is None or not isinstance(found, str) or "/" not in found or found in known:
        return
    raise UnsupportedError(
        "attn_implementation",
        f"{found!r}, a kernel of the hub, which has no build for Ascend",
        '"flash_attention_2", "sdpa" or "eager"',
        'attn_implementation="flash_attention_2", which flash_attn_npu serves',
    )


def _tell_what_is_lost(config: Any) -> None:
    kind = str(getattr(config, "model_type", ""))
    if kind in LOST and kind not in _told:
        _told.add(kind)
        _log.warning(
            "%s with flash_attention_2: transformers does not pass on %s, with the real flash-attn "
            'neither; where that matters use attn_implementation="eager" or "sdpa"',
            kind,
            LOST[kind],
        )


def _refuse(model: Any) -> None:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    for argument in sorted(refused):
        used = [name for name in _IN_CONFIG[argument] if getattr(config, name, None)]
        if used or (argument == "s_aux" and getattr(model, _COMPATIBLE, None)):
            raise UnsupportedError(
                argument,
                f"a model whose configuration sets {', '.join(used) or 'attention sinks'}",
                "None: this version of transformers would not pass it on to flash attention",
                'attn_implementation="eager", or transformers 4.57.6 or 5.20 to 5.24',
            )


def _wherever_the_model_lies(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers 4.5x refuses a model that lies on the CPU, once it is built."""

    @functools.wraps(original)
    def can_dispatch(self: Any, is_init_check: bool = False) -> Any:
        return original(self, is_init_check=True)

    return can_dispatch


def memory_of_the_card(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_device_and_memory_breakdown`, which knows no Ascend and measures the host.

    Continuous batching then sizes its cache by that, and takes more than there is.
    """

    @functools.wraps(original)
    def get_device_and_memory_breakdown() -> tuple[torch.device, int, int, int]:
        card = getattr(torch, "npu", None)
        if card is None or torch.cuda.is_available() or not card.is_available():
            found: tuple[torch.device, int, int, int] = original()
            return found
        card.empty_cache()
        card.synchronize()
        free, total = card.mem_get_info()
        return torch.device("npu"), total, card.memory_reserved(), total - free

    return get_device_and_memory_breakdown


def paged_without_softcap(original: Callable[..., Any]) -> Callable[..., Any]:
    """`paged_attention_forward` of transformers 4.5x, which drops `softcap`."""

    @functools.wraps(original)
    def paged_attention_forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("softcap") is not None:
            raise UnsupportedError(
                "softcap",
                f"{kwargs['softcap']}, from the model",
                f"None: transformers {loaded('transformers').get('__version__')} does not pass it "
                "on to paged attention",
                "generate without continuous batching, or with transformers 5.20 to 5.24",
            )
        return original(*args, **kwargs)

    return paged_attention_forward

"""What other projects do with flash_attn here, so that nobody has to find out while training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from . import installed
from .probe import Probed

__all__ = ["Client", "clients"]

OLDEST_TRANSFORMERS = (5, 20)


class Client(NamedTuple):
    """version: None if it is not installed. told: what it sees, and what to do for it."""

    name: str
    version: str | None
    told: str


def clients(probed: Probed) -> list[Client]:
    """Those that have been tried, installed or not."""
    return [
        Client(name, number, "" if number is None else tell(number, probed))
        for name, tell in _KNOWN.items()
        for number in [installed.version(name)]
    ]


def _transformers(number: str, probed: Probed) -> str:
    card = (probed.facts.get("card") or {}).get("count")
    told = [
        "after install() flash_attention_2 is served by this package, in place of "
        "transformers' own NPU functions"
        if card
        else "after install() flash_attention_2 is served by this package on the CPU too"
    ]
    if "clients" in probed.facts and "transformers" in probed.facts["clients"]:
        answer = probed.facts["clients"]["transformers"]
        told.append(f"is_flash_attn_2_available() answers {answer} then")
    if tuple(map(int, installed.release(number)[:2])) < OLDEST_TRANSFORMERS:
        told.append("it is older than 5.20, of which less is tested")
    if "transformers" in sys.modules:
        told.append("it is imported already: install() clears the answers that it keeps")
    return "; ".join(told)


def _diffusers(number: str, probed: Probed) -> str:
    told = "it looks for flash_attn once, while it is imported: import it after install()"
    if "diffusers" in sys.modules:
        told += "; it is imported already"
    return told


def _vllm(number: str, probed: Probed) -> str:
    return "its rotary embedding imports flash_attn.ops.triton.rotary, which is here"


def _verl(number: str, probed: Probed) -> str:
    return (
        "it imports flash_attn.bert_padding and the cross entropy loss, which are here; start it "
        "with flash-attn-npu, as its workers are processes of their own"
    )


def _mindspeed(number: str, probed: Probed) -> str:
    return "it puts dummies under flash_attn: call install() after mindspeed.megatron_adaptor"


_KNOWN: dict[str, Callable[[str, Probed], str]] = {
    "transformers": _transformers,
    "diffusers": _diffusers,
    "vllm": _vllm,
    "verl": _verl,
    "mindspeed": _mindspeed,
}

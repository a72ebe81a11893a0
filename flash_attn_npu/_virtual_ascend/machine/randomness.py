"""Random numbers of the simulated card: every draw is a function of the NPU generator's state.

The bits differ from a card's; that manual_seed repeats them and that each draw advances the
generator does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OFFSET_PER_DRAW = 12


def draw_seed(generator: torch.Generator | None) -> int:
    """Take the next seed from a generator of the device, the default one if None."""
    if generator is None:
        generator = torch.npu.default_generators[torch.npu.current_device()]
    if generator.device.type != "npu":
        raise RuntimeError(
            f"Expected a 'npu' device type for generator but found '{generator.device.type}'"
        )
    offset = generator.get_offset()
    generator.set_offset(offset + _OFFSET_PER_DRAW)
    return combine(generator.initial_seed(), offset)


def combine(seed: int, offset: int) -> int:
    """One 63-bit seed from a seed and an offset (splitmix64's finalizer)."""
    mask = (1 << 64) - 1
    mixed = (seed + 0x9E3779B97F4A7C15 * (offset + 1)) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1


def host_generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


@contextmanager
def default_host_generator(seed: int) -> Iterator[None]:
    """Seed the host's default generator for operators that take none, and put it back."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)

"""What is measured, the bounds it is held to, and how two calls are timed beside each other."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Bound:
    """The largest value that any figure under `key` may have."""

    key: str
    limit: float
    text: str
    unit: str = "x"


BOUNDS = {
    bound.key: bound
    for bound in (
        Bound("forward", 1.05, "causal and full, 197 to 8192 tokens, forward, of SDPA"),
        Bound("training", 1.1, "the same, forward and backward, of SDPA"),
        Bound("packed", 1.1, "packed sequences, of SDPA in a loop over them"),
        Bound("padded", 1.0, "ragged packed sequences, of SDPA over a padded batch"),
        Bound("window", 0.25, "window of 256 keys at 8192 tokens, of full causal SDPA"),
        Bound("bias", 1.3, "ALiBi and sink, of SDPA with the same as a mask"),
        Bound("softcap", 2.0, "softcap, of SDPA without it"),
        Bound("short", 2.0, "16 tokens, of SDPA"),
        Bound("decode", 0.5, "decode with grouped heads, of SDPA"),
        Bound("memory", 2.0, "peak memory at 64k tokens, of inputs and outputs"),
        Bound("host varlen", 1.15, "host time, packed inference, of npu_fusion_attention"),
        Bound("host dense", 1.08, "host time, dense inference, of npu_fusion_attention"),
        Bound("rowwise", 1.25, "rotary, norms, losses, padding, of the shortest torch expression"),
        Bound("rowwise memory", 1.02, "their peak memory, of the same expression"),
        Bound("rowwise host", 2.0, "host time of rotary, gates, norms, of torch_npu's operator"),
        Bound("import", 50.0, "import flash_attn_npu beyond torch", " ms"),
    )
}


@dataclass(frozen=True)
class Figure:
    """One measured value. A ratio is ours / theirs; `bound` is "" where none was set."""

    name: str
    value: float
    unit: str = "x"
    bound: str = ""
    ours: float | None = None
    theirs: float | None = None


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...] = (197, 512, 1024, 2048, 8192)
    long: int = 8192
    window: int = 256
    medium: tuple[int, ...] = (1024, 2048)
    packed: int = 512
    ragged: tuple[int, int] = (16, 256)
    cache: int = 2048
    memory: int = 1 << 16
    curves: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    steps: int = 5
    rows: tuple[int, int, int] = (8, 1024, 1024)


QUICK = Sizes((64, 197), 512, 32, (64,), 64, (8, 32), 64, 2048, (32, 64), 1, (2, 8, 128))


@dataclass
class Clock:
    """Times two calls in turns: a shared machine slows both alike."""

    now: Callable[[], float] = time.process_time
    seconds: float = 1.0
    fewest: int = 3
    most: int = 15

    def once(self, call: Call, count: int = 1) -> float:
        """Seconds of one call, the mean of `count`."""
        start = self.now()
        for _ in range(count):
            call()
        return (self.now() - start) / count

    def warm(self, call: Call) -> float:
        """Seconds of one call, about: the first one counts where it is long."""
        first = self.once(call)
        return first if first > 0.2 else self.once(call)

    def pair(self, ours: Call, theirs: Call) -> tuple[float, float, float]:
        """(median of ours / theirs over the pairs, median seconds of ours, of theirs)."""
        both = [max(self.warm(call), 1e-7) for call in (ours, theirs)]
        counts = [max(1, int(0.01 / taken)) for taken in both]
        each = sum(count * taken for count, taken in zip(counts, both, strict=True))
        fewest = 1 if each > 4 * self.seconds else self.fewest
        pairs = []
        gc.collect()
        for turn in range(max(fewest, min(self.most, int(self.seconds / each)))):
            taken = {}
            for place in (0, 1) if turn % 2 else (1, 0):
                taken[place] = self.once((ours, theirs)[place], counts[place])
            pairs.append((taken[0], taken[1]))
        ratio = statistics.median(mine / other for mine, other in pairs)
        mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        return ratio, mine, other


@dataclass
class Run:
    """What a case is given, and where the curves of the plots go."""

    clock: Clock
    sizes: Sizes
    threads: int = 1
    curves: list[dict[str, Any]] = field(default_factory=list)

    def beside(self, name: str, bound: str, ours: Call, theirs: Call) -> Figure:
        ratio, mine, other = self.clock.pair(ours, theirs)
        return Figure(name, ratio, "x", bound, mine, other)


Measure = Callable[[Run], list[Figure]]
"""A case; its name is its key in the dictionary that holds it."""


def verdicts(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """For each bound the figures' worst value, and whether it is met; None if not measured."""
    held = list(figures)
    told = []
    for bound in BOUNDS.values():
        of_it = [figure for figure in held if figure.bound == bound.key]
        worst = max(of_it, key=lambda figure: figure.value, default=None)
        missed = [figure.name for figure in of_it if figure.value > bound.limit]
        told.append(
            {
                "bound": bound.key,
                "text": bound.text,
                "limit": bound.limit,
                "unit": bound.unit,
                "measured": len(of_it),
                "median": statistics.median(f.value for f in of_it) if of_it else None,
                "worst": worst.value if worst else None,
                "worst_at": worst.name if worst else None,
                "missed": missed,
                "met": None if worst is None else not missed,
            }
        )
    return told

"""Time and peak memory against length, as PNG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

STYLES = {
    "flash_attn_npu, packed": ("#c0392b", "o"),
    "SDPA, one by one": ("#2980b9", "s"),
    "SDPA, padded": ("#7f8c8d", "^"),
    "eager, padded": ("#d68910", "v"),
}
CAPTION = "forward and backward of 4 ragged causal sequences, fp32, 2 heads of 64, CPU"


def draw(curves: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Two pictures; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for what, scale, label in (("seconds", 1e3, "ms"), ("bytes", 2.0**-20, "MiB held at once")):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for point in sorted(curves, key=lambda point: point["length"]):
            lines[point["what"]].append((point["length"], point[what] * scale))
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, points in lines.items():
            colour, marker = STYLES[name]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("length of the longest sequence")
        axes.set_ylabel(label)
        axes.set_title(CAPTION, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        target = folder / f"{'time' if what == 'seconds' else 'memory'}.png"
        figure.savefig(target, dpi=100)
        written.append(target)
    return written

"""The picture of how a call is served, drawn from the table that decides it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from flash_attn_npu._core.table.attention import TABLE

__all__ = ["draw"]

ROW, LABEL, COLUMN, TOP = 15, 360, 120, 190
COLOURS = {True: "#d9534f", False: "#5cb85c"}


def draw(target: Path) -> None:
    """Write the picture: the way of a call above, and below it who refuses what."""
    kernels = sorted({kernel for rule in TABLE for kernel in rule.refused}, reverse=True)
    width, height = LABEL + COLUMN * len(kernels) + 10, TOP + ROW * (len(TABLE) + 1)
    parts = [*_way(), *_heads(kernels), *_rows(kernels)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _way() -> list[str]:
    steps = [
        ("your call", "flash_attn_varlen_func(...)"),
        ("inputs, options", "checked, or ArgumentError"),
        ("one problem", "lengths read once"),
        ("the table", "first kernel that accepts"),
        ("kernel", "fused or composed"),
        ("result", "flash-attn's layout"),
    ]
    parts = []
    for place, (name, what) in enumerate(steps):
        x = 6 + place * 118
        parts.append(
            f'<rect x="{x}" y="10" width="108" height="44" rx="5" fill="#eef" stroke="#88a"/>'
            f'<text x="{x + 54}" y="28" text-anchor="middle" font-weight="bold">{name}</text>'
            f'<text x="{x + 54}" y="44" text-anchor="middle" font-size="8">{what}</text>'
        )
        if place:
            parts.append(f'<text x="{x - 9}" y="36">→</text>')
    return parts


def _heads(kernels: list[str]) -> list[str]:
    notes = [
        "green: the kernel takes it",
        "red: it does not, and says why",
    ]
    told = [f'<text x="6" y="{80 + 14 * line}">{note}</text>' for line, note in enumerate(notes)]
    for place, kernel in enumerate(kernels):
        x = LABEL + place * COLUMN + 12
        told.append(f'<text transform="translate({x},{TOP - 6}) rotate(-30)">{kernel}</text>')
    return told


def _rows(kernels: list[str]) -> list[str]:
    parts = []
    for line, rule in enumerate(TABLE):
        y = TOP + ROW * line
        parts.append(f'<text x="6" y="{y + 11}">{escape(rule.name)}</text>')
        for place, kernel in enumerate(kernels):
            reason = rule.refused.get(kernel, "")
            parts.append(
                f'<rect x="{LABEL + place * COLUMN}" y="{y}" width="{COLUMN - 4}" '
                f'height="{ROW - 3}" rx="3" fill="{COLOURS[bool(reason)]}">'
                f"<title>{escape(reason or 'native')}</title></rect>"
            )
    return parts

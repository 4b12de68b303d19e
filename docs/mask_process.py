"""Draws docs/mask_process.svg: one sentence, hidden by degrees and revealed by degrees. `python docs/mask_process.py`.

Nothing is sampled from a model; the order in which words come is drawn from a fixed seed.
"""

from __future__ import annotations

import random
import sys
from html import escape
from pathlib import Path

WORDS = ["A", "plate", "starts", "dark", "and", "the", "picture", "is", "revealed", "by", "degrees"]
SHOWN = (11, 8, 5, 2, 0)  # words that are still readable in each row
ADVANCE, HEIGHT, GAP, ROW = 8.4, 26, 7, 44
INK, PLATE, MUTED, LINE = "#1f2328", "#2b2b33", "#6a737d", "#8b949e"


def widths() -> list[float]:
    """Width of each word's box at the monospaced font below."""
    return [len(word) * ADVANCE + 10 for word in WORDS]


def draw() -> str:
    """The picture as SVG text."""
    order = list(range(len(WORDS)))
    random.Random(7).shuffle(order)
    left, top = 92.0, 34.0
    right = left + sum(widths()) + GAP * (len(WORDS) - 1)
    width, height = right + 92, top + ROW * len(SHOWN) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">',
        "<title>A sentence of eleven words, hidden word by word downwards and revealed upwards</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for i, count in enumerate(SHOWN):
        y = top + i * ROW
        share = 1 - count / len(WORDS)
        parts.append(f'<text x="{left - 14}" y="{y + 18}" text-anchor="end" fill="{MUTED}">{share:.0%}</text>')
        x = left
        for j, (word, box) in enumerate(zip(WORDS, widths(), strict=True)):
            if order.index(j) < count:
                parts.append(f'<text x="{x + 5:.1f}" y="{y + 18}" fill="{INK}">{escape(word)}</text>')
            else:
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{box:.1f}" height="{HEIGHT}" rx="3" fill="{PLATE}"/>')
            x += box + GAP
    bottom = top + ROW * (len(SHOWN) - 1) + HEIGHT
    for x, start, stop, label in (
        (28.0, top, bottom, "training hides"),
        (right + 34, bottom, top, "sampling reveals"),
    ):
        sign = 1 if stop > start else -1
        middle = (start + stop) / 2
        parts += [
            f'<path d="M{x:.0f} {start} V{stop} m-5 {-8 * sign} l5 {8 * sign} l5 {-8 * sign}" fill="none" stroke="{LINE}"/>',
            f'<text x="{x:.0f}" y="{middle:.0f}" fill="{MUTED}" text-anchor="middle" dy="-8" '
            f'transform="rotate(-90 {x:.0f} {middle:.0f})">{label}</text>',
        ]
    caption = "share of the words that is hidden"
    parts += [f'<text x="{left - 40}" y="18" fill="{MUTED}" font-size="12">{caption}</text>', "</svg>", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    target.write_text(draw(), encoding="utf-8")

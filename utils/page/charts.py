"""Charts as inline SVG for report.html: colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

HEIGHT, LEFT, BELOW = (
    150,
    44,
    84,
)  # of the plotting area, its left margin, and the room for the labels below it
NAME_LENGTH = 16


def _svg(width: float, height: float, title: str, *parts: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, words: Any, anchor: str = "middle", turn: int = 0) -> str:
    rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _scale(top: float, width: float) -> str:
    """The value axis from 0 to `top`, with three ticks across `width`."""
    ticks = ((share, 10 + HEIGHT * (1 - share)) for share in (0, 0.5, 1))
    return "".join(
        _line(LEFT, y, width, y, "grid") + _text(LEFT - 6, y + 4, f"{share * top:.3g}", "end")
        for share, y in ticks
    )


def _bar(x: float, height: float, width: float, kind: str, tip: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{10 + HEIGHT - height:.1f}" width="{width:.1f}" height="{max(0.5, height):.1f}" '
        f'class="{kind}"><title>{escape(tip)}</title></rect>'
    )


def class_bars(
    values: Sequence[float | None],
    names: Sequence[str],
    flagged: Sequence[int],
    threshold: float | None,
    title: str,
    unit: str = "",
) -> Markup:
    """A bar for each class, flagged ones marked, with the threshold as a dashed line; None is an infinite value."""
    finite = [value for value in [*values, threshold] if value is not None]
    top, step = max([*finite, 1e-3]) * 1.1, max(14, min(40, 640 / max(1, len(values))))
    width, parts = LEFT + step * len(values) + 10, []
    for k, (value, name) in enumerate(zip(values, names)):
        height = HEIGHT * (1 if value is None else value / top)
        parts.append(
            _bar(
                LEFT + k * step + 2,
                height,
                step - 4,
                "bar hot" if k in flagged else "bar",
                f"{name}: {'infinite' if value is None else f'{value:.3g}'}{unit}",
            )
        )
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
        parts.append(_text(LEFT + (k + 0.5) * step + 4, HEIGHT + 24, short, "end", -60))
    if threshold is not None:
        y = 10 + HEIGHT * (1 - threshold / top)
        parts.append(
            _line(LEFT, y, width, y, "threshold")
            + _text(width - 4, y - 4, f"threshold {threshold:.3g}", "end")
        )
    return _svg(width, HEIGHT + BELOW, title, _scale(top, width), *parts)


def histogram(values: np.ndarray, title: str, bins: int = 24) -> Markup:
    """How often values of each size occur; values that are nan are left out."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(
        values, bins=bins, range=(0, max(float(values.max(initial=0)), 1e-3))
    )
    width, step = 360, (360 - LEFT - 10) / bins
    bars = [
        _bar(
            LEFT + k * step + 0.5,
            HEIGHT * count / max(1, counts.max()),
            step - 1,
            "bar",
            f"{edges[k]:.3f} to {edges[k + 1]:.3f}: {count}",
        )
        for k, count in enumerate(counts)
    ]
    ends = [_text(LEFT + k * step, HEIGHT + 26, f"{edges[k]:.3g}") for k in (0, bins // 2, bins)]
    return _svg(
        width,
        HEIGHT + 52,
        title,
        _scale(float(counts.max()), width),
        *bars,
        *ends,
        _text(LEFT + bins * step / 2, HEIGHT + 44, title),
    )


def curves(title: str, lines: dict[str, Sequence[tuple[float, float]]]) -> Markup:
    """Shares in [0, 1] over epochs: {style class: [(epoch, share), ...]}."""
    width, points = 260, [point for line in lines.values() for point in line]
    first, last = min((p[0] for p in points), default=0), max((p[0] for p in points), default=1)
    at = lambda p: (
        LEFT + 8 + (width - LEFT - 16) * (p[0] - first) / max(1e-9, last - first),
        10 + HEIGHT * (1 - p[1]),
    )
    parts = [
        f'<polyline class="curve {kind}" points="{" ".join("{:.1f},{:.1f}".format(*at(p)) for p in line)}"/>'
        for kind, line in lines.items()
    ]
    dots = [
        '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(kind, *at(line[-1]))
        for kind, line in lines.items()
        if line
    ]
    marks = [_text(at((x, 0))[0], HEIGHT + 26, f"{x:.0f}") for x in dict.fromkeys((first, last))]
    return _svg(
        width,
        HEIGHT + 52,
        f"{title}: C-Acc and ASR over epochs",
        _scale(1, width),
        *parts,
        *dots,
        *marks,
        _text(width / 2 + 16, HEIGHT + 44, f"{title}, epochs"),
    )


def finite(value: Any) -> float | None:
    """The value as a float, None where it is missing or no finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

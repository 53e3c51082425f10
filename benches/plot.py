# SPDX-License-Identifier: BSD-3-Clause
"""Bars as an SVG, written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

_WIDTH = 1160
_LEFT = 84
_RIGHT = 24
_PANEL_HEIGHT = 250
_TITLE_HEIGHT = 34
_LABEL_HEIGHT = 58
_HEAD_HEIGHT = 74
_FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"
# Mostly those of Okabe and Ito, which eyes that see no red or green tell apart, too.
_COLOURS = [
    "#999999",
    "#e69f00",
    "#0072b2",
    "#56b4e9",
    "#cccccc",
    "#009e73",
    "#666666",
    "#004466",
    "#d55e00",
    "#cc79a7",
]


@dataclass(frozen=True)
class Bar:
    """A median, and the least and the greatest sample."""

    series: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Bars side by side, above one label."""

    label: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Panel:
    """One axis, from zero."""

    title: str
    unit: str
    groups: Sequence[Group]


def draw(title: str, subtitle: str, panels: Sequence[Panel], series: Sequence[str]) -> str:
    """The whole picture. `series` has the names of all that may occur: each keeps its colour."""
    shown = {bar.series for panel in panels for group in panel.groups for bar in group.bars}
    colours = {name: colour for name, colour in zip(series, cycle(_COLOURS), strict=False) if name in shown}
    height = _HEAD_HEIGHT + len(panels) * (_TITLE_HEIGHT + _PANEL_HEIGHT + _LABEL_HEIGHT)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
        f"viewBox='0 0 {_WIDTH} {height}'>",
        f"<rect width='{_WIDTH}' height='{height}' fill='white'/>",
        _text(_LEFT, 26, title, size=18, weight="bold"),
        _text(_LEFT, 46, subtitle, size=12, colour="#444444"),
        *_legend(colours),
    ]
    top = _HEAD_HEIGHT
    for panel in panels:
        parts += _panel(panel, top, colours)
        top += _TITLE_HEIGHT + _PANEL_HEIGHT + _LABEL_HEIGHT
    return "\n".join([*parts, "</svg>", ""])


def _legend(colours: dict[str, str]) -> list[str]:
    parts, left = [], _LEFT
    for name, colour in colours.items():
        parts.append(f"<rect x='{left}' y='56' width='12' height='12' fill='{colour}'/>")
        parts.append(_text(left + 17, 67, name, size=12))
        left += 30 + 7 * len(name)
    return parts


def _panel(panel: Panel, top: int, colours: dict[str, str]) -> list[str]:
    bottom = top + _TITLE_HEIGHT + _PANEL_HEIGHT
    highest = max((bar.high for group in panel.groups for bar in group.bars), default=0.0)
    step = _step(highest)
    ceiling = max(math.ceil(highest / step), 1) * step
    scale = _PANEL_HEIGHT / ceiling
    middle = top + _TITLE_HEIGHT + _PANEL_HEIGHT // 2
    parts = [
        _text(_LEFT, top + 22, panel.title, size=14, weight="bold"),
        _text(20, middle, panel.unit, size=12, anchor="middle", turned=True),
    ]
    for number in range(round(ceiling / step) + 1):
        value = number * step
        y = bottom - value * scale
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#dddddd'/>"
        )
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", size=11, anchor="end"))
    # A group is as wide as its bars, and its label has room.
    weights = [max(len(group.bars), 3) + 1 for group in panel.groups]
    left = float(_LEFT)
    for group, weight in zip(panel.groups, weights, strict=True):
        room = (_WIDTH - _LEFT - _RIGHT) * weight / sum(weights)
        parts += _group(group, left, room, bottom, scale, colours)
        left += room
    parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{bottom}' y2='{bottom}' stroke='#222222'/>")
    return parts


def _group(
    group: Group, left: float, room: float, bottom: int, scale: float, colours: dict[str, str]
) -> list[str]:
    width = min(room * 0.86 / max(len(group.bars), 1), 44)
    parts = [_text(left + room / 2, bottom + 20, group.label, size=12, anchor="middle")]
    x = left + (room - width * len(group.bars)) / 2
    for bar in group.bars:
        top, low, high = (bottom - value * scale for value in (bar.value, bar.low, bar.high))
        centre = x + width / 2
        parts.append(
            f"<rect x='{x + 1:.1f}' y='{top:.1f}' width='{width - 2:.1f}' height='{bottom - top:.1f}' "
            f"fill='{colours[bar.series]}'><title>{escape(bar.series)}: {bar.value:.4g} "
            f"({bar.low:.4g} to {bar.high:.4g})</title></rect>"
        )
        parts.append(
            f"<line x1='{centre:.1f}' x2='{centre:.1f}' y1='{low:.1f}' y2='{high:.1f}' stroke='#222222'/>"
        )
        number = f"{bar.value:.3g}" if bar.value < 1000 else f"{bar.value:,.0f}"
        parts.append(_text(centre, min(top, high) - 4, number, size=9, anchor="middle"))
        x += width
    return parts


def _step(highest: float) -> float:
    """Of the axis: 1, 2 or 5 times a power of ten, for four to ten lines."""
    if highest <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(highest / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if highest / (power * factor) <= 8)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    anchor: str = "start",
    weight: str = "normal",
    colour: str = "#111111",
    turned: bool = False,
) -> str:
    turn = f" transform='rotate(-90 {x:.1f} {y:.1f})'" if turned else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{colour}'{turn}>{escape(text)}</text>"
    )

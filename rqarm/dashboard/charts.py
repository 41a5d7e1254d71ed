"""Charts as SVG made on the server: no script draws, so the policy allows none, and a screen reader gets the table.

Colours are classes of dashboard.css.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

#: of the wide chart and of the histograms, in about the pixels that they get on a desktop: so their text is readable
WIDE, NARROW, HEIGHT = 960, 400, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 4, 8, 20


def stacked(
    minutes: Sequence[Mapping[str, int]], series: Sequence[str], labels: Sequence[str], *, title: str, summary: str
) -> Markup:
    """Bars, one for each of ``minutes``, stacked by ``series`` from the bottom. ``labels`` stand below the bars."""
    highest = _round_up(max((sum(each.get(name, 0) for name in series) for each in minutes), default=0))
    inner_width, inner_height = WIDE - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = inner_width / max(len(minutes), 1)
    parts = [_axis(highest, inner_height, WIDE)]
    for place, each in enumerate(minutes):
        below = 0
        for name in series:
            count = each.get(name, 0)
            if not count:
                continue
            height = inner_height * count / highest
            top = TOP + inner_height * (1 - (below + count) / highest)
            parts.append(
                Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    name, LEFT + place * step + 0.5, top, max(step - 1, 0.5), height
                )
            )
            below += count
    for place, label in enumerate(labels):
        if label:
            x = LEFT + (place + 0.5) * step
            parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, HEIGHT - 5, label))
    return _svg(parts, title, summary, WIDE)


def bars(counts: Sequence[tuple[str, int]], *, title: str, summary: str) -> Markup:
    """A histogram: one bar for each (label, count)."""
    highest = _round_up(max((count for _, count in counts), default=0))
    inner_width, inner_height = NARROW - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = inner_width / max(len(counts), 1)
    parts = [_axis(highest, inner_height, NARROW)]
    for place, (label, count) in enumerate(counts):
        x, height = LEFT + place * step, inner_height * count / highest
        parts.append(
            Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                x + step * 0.1, TOP + inner_height - height, step * 0.8, height
            )
        )
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x + step / 2, HEIGHT - 5, label)
        )
    return _svg(parts, title, summary, NARROW)


def _axis(highest: int, inner_height: int, width: int) -> Markup:
    lines = Markup("")
    for part in (0, 0.5, 1):
        y, value = TOP + inner_height * (1 - part), highest * part
        lines += Markup('<line class="axis" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, width - RIGHT, y, y
        )
        if value == int(value):
            lines += Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:,}</text>').format(LEFT - 6, y + 4, int(value))
    return lines


def _svg(parts: Sequence[Markup], title: str, summary: str, width: int) -> Markup:
    head = Markup('<svg class="chart w{}" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(
        width, width, HEIGHT, summary, title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _round_up(count: int) -> int:
    """The next of 2, 4, 10, 20, 40, 100, ...: a top of the axis whose half is whole."""
    top = 2
    while top < count:
        unit = 10 ** (len(str(top)) - 1)
        top = {1: 2, 2: 4, 4: 10}[top // unit] * unit
    return top


def submissions(minutes: Sequence[Mapping[str, Any]], series: Sequence[str]) -> Markup:
    """Submissions per minute by outcome; ``minutes`` as rqarm.inspect has them."""
    return _per_minute(minutes, "submissions", series)


def executions(minutes: Sequence[Mapping[str, Any]], series: Sequence[str]) -> Markup:
    """Ends of attempts per minute by outcome."""
    return _per_minute(minutes, "executions", series)


def _per_minute(minutes: Sequence[Mapping[str, Any]], what: str, series: Sequence[str]) -> Markup:
    labels = ["" for _ in minutes]
    for place in range(0, len(minutes), 10):
        labels[place] = f"{datetime.fromtimestamp(minutes[place]['at'], UTC):%H:%M}"
    counts = [each[what] for each in minutes]
    total = {name: sum(each.get(name, 0) for each in counts) for name in series}
    told = ", ".join(f"{count:,} {name}" for name, count in total.items() if count) or "none"
    summary = f"{what.capitalize()} in the last {len(minutes)} minutes: {told}. Times are UTC."
    return stacked(counts, series, labels, title=summary, summary=summary)


def ranges(counts: Sequence[Mapping[str, Any]], title: str) -> Markup:
    """A histogram of durations; each range has ``upto`` in seconds (None = above all) and ``count``.

    A label is the upper end of its range.
    """
    last = next((each["upto"] for each in reversed(counts) if each["upto"] is not None), 0.0)
    named = [
        (_short(each["upto"]) if each["upto"] is not None else f"> {_short(last)}", each["count"]) for each in counts
    ]
    told = ", ".join(f"{label}: {count:,}" for label, count in named if count) or "none"
    return bars(named, title=title, summary=f"{title}: {told}")


def _short(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"

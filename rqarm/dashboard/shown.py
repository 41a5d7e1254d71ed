"""How values read on a page. What is text of others stays text: escaping is Jinja's, and it is on everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from markupsafe import Markup

from rqarm.text import brief, duration, jsonable, plain, size

#: stands for a number that nobody knows
NOT_KNOWN = "-"
#: characters of a value, and bytes of stored data, that a page shows
PREVIEW_CHARS = 4_000
#: elements a value may have to be laid out as JSON for a page
PREVIEW_BYTES = 262_144


def ago(moment: datetime | str | None) -> Markup | str:
    """A moment as how long ago it was; its exact time stands in the element."""
    when = as_time(moment)
    if when is None:
        return ""
    seconds = (datetime.now(UTC) - when).total_seconds()
    text = f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"
    iso = when.isoformat(timespec="seconds")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(iso, iso, text)


def clock(moment: datetime | str | None) -> Markup | str:
    """A moment as date and time in UTC."""
    when = as_time(moment)
    if when is None:
        return ""
    iso = when.isoformat(timespec="milliseconds")
    return Markup('<time datetime="{}">{:%Y-%m-%d %H:%M:%S}.{:03d} UTC</time>').format(
        iso, when, when.microsecond // 1000
    )


def as_time(moment: datetime | str | None) -> datetime | None:
    if not moment:
        return None
    when = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return when.astimezone(UTC)


def number(value: float | None) -> str:
    """Thousands apart."""
    if value is None:
        return NOT_KNOWN
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def seconds(value: float | None) -> str:
    return NOT_KNOWN if value is None else brief(value)


def share(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.1%}"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def event_time(event_id: str) -> datetime:
    """When an event happened: its id begins with Unix milliseconds."""
    return datetime.fromtimestamp(int(event_id.partition("-")[0]) / 1000, UTC)


FILTERS: dict[str, Callable[..., Any]] = {
    "ago": ago,
    "event_time": event_time,
    "clock": clock,
    "number": number,
    "seconds": seconds,
    "share": share,
    "size": lambda value: NOT_KNOWN if value is None else size(int(value)),
    "plural": plural,
    "words": lambda word: str(word).replace("_", " "),
}


def json_preview(value: Any) -> tuple[str, bool]:
    """A value as JSON for people, and whether it was cut."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False)
    return cut(text)


def cut(text: str) -> tuple[str, bool]:
    """The beginning of a text, with nothing in it that turns or hides text; and whether there is more."""
    shown = plain(text[:PREVIEW_CHARS], keep="\n\t")
    return shown, len(text) > PREVIEW_CHARS


def bytes_preview(head: bytes, content_type: str) -> str:
    """The beginning of stored bytes: as text when they claim to be and are, else as a hex dump."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind.endswith(("json", "xml", "csv", "yaml", "javascript")):
        try:
            return cut(head.decode("utf-8", "strict"))[0]
        except UnicodeDecodeError as error:
            if error.start > len(head) - 4:  # the cut fell into a character
                return cut(head[: error.start].decode())[0]
    lines = []
    for at in range(0, min(len(head), 512), 16):
        row = head[at : at + 16]
        told = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:06x}  {row.hex(' '):<47}  {told}")
    return "\n".join(lines)


def scrubbed(value: Any, secret_params: Sequence[str]) -> Any:
    """A document without the values whose names say that they are secret, at any depth."""
    if isinstance(value, dict):
        return {
            name: "***" if is_secret(str(name), secret_params) else scrubbed(item, secret_params)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [scrubbed(item, secret_params) for item in value]
    return value


def is_secret(name: str, secret_params: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in secret_params)

"""Text of others made harmless: for a terminal, for a log.

What comes from Redis, a URI or a handler's error may hold control characters. Whoever shows it passes it through
``plain`` first.
"""

from __future__ import annotations

import re
import unicodedata

#: what is worth a look: everything but printable ASCII
SUSPECT = re.compile(r"[^\x20-\x7e]")


def plain(text: str, keep: str = "") -> str:
    """The text with what would move a cursor, turn or hide text, or end a line written out, except ``keep``."""
    return SUSPECT.sub(lambda match: match[0] if match[0] in keep else _written_out(match[0]), text)


def is_unsafe(char: str) -> bool:
    # joiners are format characters too, but scripts and emoji need them
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def _written_out(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if is_unsafe(char) else char

"""Load and describe lua/*.lua.

A script on the wire is: shebang where its header asks for flags, what it needs of the prelude, the file. The header is
data: KEYS, ARGV and Returns are read here, and a test holds them against the ``local`` names below it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from rqarm.keys import LUA_CONSTANTS, expand_names

#: the files of the prelude, each of which builds on those before it
PRELUDE = ("base", "counters", "line", "claims", "aliases", "quarantine", "results", "followups", "search")

_FOLDER = resources.files("rqarm") / "lua"
_ENTRY = re.compile(r"^-- (KEYS|ARGV) +(\S+) +(\S+) *(.*)$")
_COMMENT = re.compile(r"--.*")
_DEFINED = re.compile(r"^local (?:function )?(\w+)(?:, (\w+))?", re.MULTILINE)
#: from the mark of a block that hardly ever runs to its end; none stands in another
_RARE = re.compile(r"^ *-- RARE\n(.*?)^ *-- /RARE\n", re.MULTILINE | re.DOTALL)
_OUTCOME = re.compile(r"\{'([a-z_]+)'")


@dataclass(frozen=True, slots=True)
class Script:
    """One transition. ``text`` and ``sha`` are for a server that knows flags, ``plain_*`` for fakeredis."""

    name: str
    keys: tuple[str, ...]
    argv: tuple[str, ...]
    outcomes: frozenset[str]
    text: str
    sha: str
    plain_text: str
    plain_sha: str


@cache
def script(name: str) -> Script:
    """The script of this verb. Raises FileNotFoundError for a verb that does not exist."""
    body = _read(name)
    header = body.split("\n\n", 1)[0].splitlines()
    entries = [match.groups() for line in header if (match := _ENTRY.match(line))]
    flags = [line.removeprefix("-- FLAGS ").strip() for line in header if line.startswith("-- FLAGS ")]
    returns = " ".join(line for line in header if "{'" in line)
    before, mark, after = body.rpartition("-- PRELUDE\n")
    plain = expand_names(LUA_CONSTANTS + _with_prelude(prelude().split("\n\n"), [before, mark + after]))
    text = f"#!lua flags={flags[0]}\n{plain}" if flags else plain
    return Script(
        name=name,
        keys=tuple(entry[1] for entry in entries if entry[0] == "KEYS"),
        argv=tuple(entry[1] for entry in entries if entry[0] == "ARGV"),
        outcomes=frozenset(_OUTCOME.findall(returns)),
        text=text,
        sha=_sha(text),
        plain_text=plain,
        plain_sha=_sha(plain),
    )


@cache
def all_scripts() -> tuple[Script, ...]:
    """Every transition, by name."""
    names = sorted(file.name.removesuffix(".lua") for file in _FOLDER.iterdir() if file.name.endswith(".lua"))
    return tuple(script(name) for name in names)


@cache
def prelude() -> str:
    """What the scripts share, in paragraphs."""
    return "\n".join(_read(f"prelude/{part}") for part in PRELUDE)


def _with_prelude(paragraphs: list[str], parts: list[str]) -> str:
    """The parts of a script, each behind the paragraphs of the prelude that it is the first to need."""
    text, given = "", frozenset[int]()
    for part in parts:
        text += _filled(paragraphs, part, given)
        given |= _needed(paragraphs, part)
    return text


def _filled(paragraphs: list[str], part: str, given: frozenset[int]) -> str:
    """A part behind the paragraphs that it needs beside those that are ``given``, and so each of its rare blocks.

    A script makes its functions anew at every run, and that costs more than most of what it does. So what only a rare
    block needs is made in that block: a paragraph sees those in front of it, and its rare blocks what they need too.
    """
    wanted = _needed(paragraphs, part) - given
    text = ""
    for i in sorted(wanted):
        before = given | {each for each in wanted if each < i}
        text += _with_blocks(paragraphs, paragraphs[i], before) + "\n\n"
    return text + _with_blocks(paragraphs, part, given | wanted)


def _with_blocks(paragraphs: list[str], part: str, given: frozenset[int]) -> str:
    return _RARE.sub(lambda block: _filled(paragraphs, block[1], given), part)


def _needed(paragraphs: list[str], part: str) -> frozenset[int]:
    """The paragraphs whose names the part uses, or that these use in turn; what rare blocks use does not count."""
    defined = [{name for pair in _DEFINED.findall(paragraph) for name in pair if name} for paragraph in paragraphs]
    wanted, text = set[int](), part
    while True:
        words = set(re.findall(r"\w+", _COMMENT.sub("", _RARE.sub("", text))))
        more = {i for i, names in enumerate(defined) if i not in wanted and words.intersection(names)}
        if not more:
            return frozenset(wanted)
        wanted |= more
        text = "\n".join(paragraphs[i] for i in more)


def _read(name: str) -> str:
    return _FOLDER.joinpath(f"{name}.lua").read_text("utf-8")


def _sha(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

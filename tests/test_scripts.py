"""The scripts as text: a reader may trust each header, and rules that can be seen without a server are kept.

No server here. What the scripts do is in test_transitions.py and the files beside it that use transitions.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rqarm import keys, scripts
from rqarm.keys import PATTERNS, RECORD_FIELDS, Keys, expand_names
from rqarm.model import TRANSITIONS, Key
from rqarm.scripts import PRELUDE, Script, all_scripts, prelude, script

NAMES = tuple(each.name for each in all_scripts())
LUA = Path(scripts.__file__).parent / "lua"
SOURCES = {
    file.relative_to(LUA).with_suffix("").as_posix(): file.read_text("utf-8") for file in sorted(LUA.rglob("*.lua"))
}
#: scripts that the server may refuse when memory is out, or that only read; the others must always get through
READING = {"read", "follow", "locate", "browse", "stats", "overview", "search", "claims", "inspect", "survey"}
WITHOUT_FLAGS = {"submit", "put", "emit", "requeue", "link", "trace"} | READING
#: Lua's own `error` is a function: the name below a header is another
ALIASES = {"error": "err"}
#: commands that give a key a TTL, and the only places where they may stand
GIVES_TTL = re.compile(r"'(P?EXPIRE(?:AT)?|P?SETEX|GETEX|[EP]X(?:AT)?|RESTORE)'")
MAY_GIVE_TTL = {
    "prelude/base": {"PEXPIREAT"},
    "prelude/claims": {"PEXPIRE"},
    "prelude/aliases": {"PEXPIRE"},
    "fail": {"PEXPIRE"},
    "cancel": {"PEXPIRE"},
    "complete": {"PEXPIRE"},
    "link": {"PEXPIRE"},
    "redirect": {"PEXPIRE"},
}

_BINDING = re.compile(r"^local ([\w, ]+) = (.*(?:KEYS|ARGV).*)$", re.MULTILINE)
_EXPRESSION = re.compile(r"(tonumber\()?(\{unpack\()?(KEYS|ARGV)(?:\[|, )(\d+)(?:\]|\)\})\)?(?:, |$)")


def split(name: str) -> tuple[str, str]:
    """Header and body; the body without comments."""
    header, body = SOURCES[name].split("\n\n", 1)
    return header, re.sub(r"--[^\n]*", "", body)


def bindings(name: str) -> Iterator[tuple[str, str, int, bool]]:
    """Each bound name with KEYS or ARGV, the index, and whether it takes all from there on."""
    for match in _BINDING.finditer(split(name)[1]):
        bound = match[1].split(", ")
        sources = _EXPRESSION.findall(match[2])
        assert len(bound) == len(sources), f"{name}: cannot read {match[0]!r}"
        for variable, (_, trailing, table, index) in zip(bound, sources, strict=True):
            yield variable, table, int(index), bool(trailing)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_below_a_header_are_those_of_the_header_in_its_order(name: str) -> None:
    known = script(name)
    headed = {"KEYS": known.keys, "ARGV": known.argv}
    seen: dict[str, list[int]] = {"KEYS": [], "ARGV": []}
    for variable, table, index, trailing in bindings(name):
        assert index <= len(headed[table]), f"{table}[{index}] is not in the header"
        title = headed[table][index - 1]
        assert variable == ALIASES.get(title, title), f"{table}[{index}] is {title!r} in the header"
        assert not trailing or index == len(headed[table]), f"{title!r} goes to the end and is not the last"
        seen[table].append(index)
    assert seen["KEYS"] == list(range(1, len(known.keys) + 1))
    # the prefix is bound for all of them, in front of every script
    assert [i for i in seen["ARGV"] if i > 1] == list(range(2, len(known.argv) + 1))
    assert known.argv[0] == "prefix"


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_argv_are_mentioned_where_they_get_their_name_and_nowhere_else(name: str) -> None:
    body = _BINDING.sub("", split(name)[1])
    assert not re.search(r"\b(KEYS|ARGV|PREFIX)\b", body)


def test_the_prelude_takes_no_argument() -> None:
    assert not re.search(r"\b(KEYS|ARGV|PREFIX)\b", re.sub(r"--[^\n]*", "", prelude()))


@pytest.mark.parametrize("name", NAMES)
def test_the_header_names_each_argument_once(name: str) -> None:
    known = script(name)
    assert len(known.keys) == 1
    assert len(set(known.argv)) == len(known.argv)
    header = split(name)[0]
    described = re.findall(r"^-- (?:KEYS|ARGV) +\S+ +(\S+)", header, re.MULTILINE)
    assert set(described) <= {"hash", "zset", "set", "str", "bytes", "int", "0|1"}


@pytest.mark.parametrize("name", NAMES)
def test_every_word_that_a_body_returns_is_in_its_header_and_reverse(name: str) -> None:
    body = split(name)[1]
    words = set(re.findall(r"(?:return|page =) \{'([a-z_]+)'", body))
    words |= set(re.findall(r"\boutcome(?:, extra)? = '([a-z_]+)'", body))
    # `local outcome = stored and 'hit' or 'joined'`
    for pair in re.findall(r"\boutcome = \w+ and '([a-z_]+)' or '([a-z_]+)'", body):
        words |= set(pair)
    assert words == script(name).outcomes


def test_what_only_a_rare_block_needs_is_made_in_it() -> None:
    paragraphs = [
        "local function one() end\n",
        "local function two() one() end\n",
        "local function three() end\n",
        "local function four()\n  -- RARE\n  two()\n  three()\n  -- /RARE\nend\n",
    ]
    text = scripts._with_prelude(paragraphs, ["three()\n", "four()\n"])
    shown = [line.strip() for line in text.splitlines() if line.strip()]
    assert shown == [
        "local function three() end", "three()",
        "local function four()", "local function one() end", "local function two() one() end", "two()", "three()",
        "end", "four()",
    ]  # fmt: skip


def test_each_rare_block_ends_before_the_next_and_in_its_paragraph() -> None:
    for text in [*prelude().split("\n\n"), *(SOURCES[name] for name in NAMES)]:
        marks = re.findall(r"^ *-- (/?RARE)$", text, re.MULTILINE)
        assert marks == ["RARE", "/RARE"] * (len(marks) // 2)
        assert len(scripts._RARE.findall(text)) == len(marks) // 2


@pytest.mark.parametrize("name", NAMES)
def test_a_script_begins_with_its_name_and_what_it_is_for(name: str) -> None:
    assert SOURCES[name].startswith(f"-- {name}: ")


@pytest.mark.parametrize("verb", TRANSITIONS)
def test_every_verb_of_the_model_has_a_script(verb: str) -> None:
    assert script(verb).name == verb


def test_a_verb_that_does_not_exist_is_not_a_script() -> None:
    with pytest.raises(FileNotFoundError):
        script("frobnicate")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_a_shebang_exactly_when_its_header_asks_for_flags(name: str) -> None:
    known = script(name)
    has_shebang = known.text.startswith("#!lua flags=allow-oom\n")
    assert has_shebang == ("-- FLAGS allow-oom\n" in SOURCES[name])
    assert has_shebang == (name not in WITHOUT_FLAGS)
    assert known.text.removeprefix("#!lua flags=allow-oom\n") == known.plain_text
    assert "#!" not in known.plain_text


@pytest.mark.parametrize("known", all_scripts(), ids=NAMES)
def test_the_sha_is_that_of_the_text_on_the_wire(known: Script) -> None:
    assert known.sha == hashlib.sha1(known.text.encode()).hexdigest()
    assert known.plain_sha == hashlib.sha1(known.plain_text.encode()).hexdigest()


def test_there_is_a_script_for_every_file_and_the_prelude_has_all_of_its_own() -> None:
    assert {*NAMES, *(f"prelude/{part}" for part in PRELUDE)} == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_no_script_spells_a_key_name(name: str) -> None:
    strings = re.findall(r"'([^'\n]*)'", re.sub(r"--[^\n]*", "", SOURCES[name]))
    literals = {part for pattern in PATTERNS.values() for part in re.split(r"\{\w+\}", pattern) if part != ":"}
    # keys that are also words: of the sweep's answer, a kind of follow-up, what is counted
    assert not (set(strings) & (literals - {"", "swept", "quarantine", "redirected"}))
    assert not [text for text in strings if text.startswith(("rq:", "arm:"))]


@pytest.mark.parametrize("name", SOURCES)
def test_no_script_gives_a_ttl_to_what_is_in_flight(name: str) -> None:
    found = set(GIVES_TTL.findall(re.sub(r"--[^\n]*", "", SOURCES[name])))
    assert found == MAY_GIVE_TTL.get(name, set())


@pytest.mark.parametrize("name", SOURCES)
def test_only_a_result_its_record_and_a_replaced_ticket_get_a_ttl(name: str) -> None:
    source = re.sub(r"--[^\n]*", "", SOURCES[name])
    receivers = re.findall(r"(?<!function )(?:expire_at\(|'PEXPIRE', )(\w+)", source)
    ended = {"callbacks_name", "followup_name", "emitted_name", "aliases_name", "handed"}
    assert set(receivers) <= {"chunk_name", "result_name", "status_name", "status", "replaced", "traces"} | ended


@pytest.mark.parametrize("name", SOURCES)
def test_no_script_uses_what_fakeredis_lacks_or_what_reads_the_whole_key_space(name: str) -> None:
    source = re.sub(r"--[^\n]*", "", SOURCES[name])
    assert not re.search(r"\b(cmsgpack|bit|struct|os)\.\w+\(", source)
    assert not re.search(r"'(KEYS|SCAN|FLUSH\w+|RANDOMKEY)'", source)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_carries_each_paragraph_of_the_prelude_that_it_needs(name: str) -> None:
    body = split(name)[1].rpartition("-- PRELUDE")[2]
    text = script(name).plain_text
    defined = {match[1] for match in re.finditer(r"^local function (\w+)", prelude(), re.MULTILINE)}
    carried = {function for function in defined if f"local function {function}(" in text}
    assert {function for function in defined if re.search(rf"\b{function}\(", body)} <= carried


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_used_before_it_is_defined(name: str) -> None:
    text = re.sub(r"--[^\n]*", "", script(name).plain_text)
    for function in set(re.findall(r"^local function (\w+)", text, re.MULTILINE)):
        first = re.search(rf"\b{function}\b", text)
        assert first is not None
        assert text[: first.start()].endswith("function "), f"{function} is used above its definition"


def test_every_name_is_written_out() -> None:
    for kind, pattern in PATTERNS.items():
        parts = re.findall(r"\{(\w+)\}", pattern)
        written = expand_names(f"x({kind}_name({', '.join(parts)}))")
        assert written.startswith("x((PREFIX .. '")
        assert "_name(" not in written
        # run by hand: the same name as Python makes
        values = {part: f"<{part}>" for part in parts}
        pieces = written.removeprefix("x((").removesuffix("))").split(" .. ")
        spoken = "".join("arm:" if p == "PREFIX" else p.strip("'") if p.startswith("'") else values[p] for p in pieces)
        assert spoken == Keys("arm").named(kind, **values)


def test_no_name_is_left_unwritten_in_any_script() -> None:
    for known in all_scripts():
        assert not re.search(r"\b(" + "|".join(PATTERNS) + r")_name\b", known.plain_text), known.name


@pytest.mark.parametrize("text", ["status_name()", "leases_name(key)", "chunk_name(key, owner)", "result_name(a, b)"])
def test_a_name_with_the_wrong_number_of_arguments_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"has \d arguments, the name takes \d"):
        expand_names(f"redis.call('GET', {text})")


def test_an_argument_may_hold_an_index() -> None:
    assert expand_names("chunk_name(key, stored[1], n)") == (
        "(PREFIX .. 'chunk:' .. key .. ':' .. stored[1] .. ':' .. n)"
    )


def test_python_and_lua_spell_a_name_alike() -> None:
    names, key = Keys("other"), Key("k")
    assert names.status(key) == names.named("status", key="k") == "other:status:k"
    assert names.done(key) == names.named("done", key="k") == names.pubsub_prefix + "k"
    assert names.chunk(key, "7", 0) == names.named("chunk", key="k", owner="7", n="0") == "other:chunk:k:7:0"


def test_scripts_and_python_read_the_same_record_fields() -> None:
    assert len(set(RECORD_FIELDS)) == len(RECORD_FIELDS)
    written = ", ".join(f"'{name}'" for name in RECORD_FIELDS)
    assert f"local RECORD_FIELDS = {{{written}}}\n" in keys.LUA_CONSTANTS
    # submit reads three of them by their place
    assert scripts.script("submit").plain_text.startswith(keys.LUA_CONSTANTS)


def test_each_mutant_names_a_text_that_stands_in_the_source_once() -> None:
    """What scripts/mutants.py breaks on purpose; running them takes an hour, that they can run is seen here."""
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("mutants", root / "scripts" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    mutants = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = mutants  # dataclasses look their module up
    spec.loader.exec_module(mutants)
    times = {each.name: (root / "rqarm" / each.path).read_text("utf-8").count(each.old) for each in mutants.MUTANTS}
    assert {name: n for name, n in times.items() if n != 1} == {}
    assert len(times) == len(mutants.MUTANTS) >= 90

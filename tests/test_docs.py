"""The documentation is true: tables equal the code, links resolve, code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

import rqarm
from rqarm.cli import common
from rqarm.config import Settings
from rqarm.dashboard import Options
from rqarm.errors import InvalidRequest
from rqarm.keys import PATTERNS, RECORD_FIELDS
from rqarm.model import State
from rqarm.scripts import all_scripts, script
from rqarm.uri import canonicalize

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*.md"))]
LUA = ROOT / "rqarm" / "lua"

#: variables that are no settings, and the module that reads each
OTHER_VARIABLES = {
    "RQARM_HANDLERS": "worker/loading.py",
    "RQARM_ALLOW_FUNCTIONS": "worker/allowed.py",
    "RQARM_HOME": "embedded.py",
    "RQARM_DEBUG": "cli/common.py",
}


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text("utf-8")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table rows below a heading, up to the next one; without the head of each table."""
    section = re.split(r"^#+ ", text.split(heading, 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    ruled = {n for n, row in enumerate(cells) if set("".join(row)) <= set("-")}
    found = [row for n, row in enumerate(cells) if n not in ruled and n + 1 not in ruled]
    assert found, f"there is no table below {heading!r}"
    return found


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_table_of_settings_has_every_setting_in_its_order_and_nothing_else() -> None:
    shown = [codes(row[0])[0] for row in rows(text_of("operations.md"), "## Settings")]
    assert shown == [f"RQARM_{field.name.upper()}" for field in fields(Settings)] + list(OTHER_VARIABLES)


def test_the_table_of_settings_shows_the_defaults() -> None:
    defaults = Settings()
    for variable, default, *_ in rows(text_of("operations.md"), "## Settings")[: len(fields(Settings))]:
        name = codes(variable)[0]
        actual = getattr(defaults, name.removeprefix("RQARM_").lower())
        if default == "-":
            assert actual in (None, ()), name
        else:
            read = Settings.load({name: codes(default)[0]})
            assert getattr(read, name.removeprefix("RQARM_").lower()) == actual, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_variable_that_a_page_names_is_read_by_somebody(page: Path) -> None:
    named = set(re.findall(r"RQARM_[A-Z_]+", page.read_text("utf-8")))
    known = {f"RQARM_{field.name.upper()}" for field in fields(Settings)}
    known |= {f"RQARM_DASHBOARD_{field.name.upper()}" for field in fields(Options)}
    assert named <= known | set(OTHER_VARIABLES)


@pytest.mark.parametrize(("variable", "module"), OTHER_VARIABLES.items())
def test_the_variables_that_are_no_settings_are_read_where_the_test_says(variable: str, module: str) -> None:
    assert f'"{variable}"' in (ROOT / "rqarm" / module).read_text("utf-8")


def test_the_table_of_exit_codes_is_that_of_the_command_line() -> None:
    shown = {int(row[0]) for row in rows(text_of("operations.md"), "## Command line")}
    assert shown == {0, common.FAILURE, common.USAGE, common.NOT_READY, common.NO_SERVER, common.INTERRUPTED}


def test_the_modules_of_internals_exist() -> None:
    for _, where in rows(text_of("internals.md"), "## Where a line belongs"):
        for name in codes(where):
            place = ROOT / "rqarm" / (name if name.endswith(".lua") else name.replace(".", "/"))
            assert place.exists() or place.with_suffix(".py").exists(), name


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_table_of_keys_has_every_pattern_and_nothing_else() -> None:
    shown = [codes(row[0])[0] for row in rows(text_of("keys.md"), "## The table")]
    assert sorted(shown) == sorted(PATTERNS.values())


def test_the_table_of_fields_has_every_field_of_the_record_and_nothing_else() -> None:
    shown = [codes(row[0])[0] for row in rows(text_of("keys.md"), "## The record")]
    assert len(shown) == len(set(shown))
    assert set(shown) == set(RECORD_FIELDS) | fields_in_the_scripts()


def fields_in_the_scripts() -> set[str]:
    """What the scripts read of a record or write into one."""
    found = set[str]()
    for file in LUA.rglob("*.lua"):
        lua = file.read_text("utf-8")
        for arguments in re.findall(r"\brecord\(\w+,([^)]*)\)", lua):
            found.update(re.findall(r"'(\w+)'", arguments))
        on_status = r"redis\.call\('(H\w+)', status(?:_name\(key\))?, (.*?)\)(?=\)? *(?:\n|end|then|$))"
        for command, arguments in re.findall(on_status, lua, re.DOTALL):
            words = split_arguments(arguments)
            names = words[::2] if command == "HSET" else words[:1] if command == "HINCRBY" else words
            found.update(name[1:-1] for name in names if re.fullmatch(r"'\w+'", name))
    return found


def split_arguments(lua: str) -> list[str]:
    """The arguments of a call in Lua: commas inside parentheses do not split."""
    arguments, depth = [""], 0
    for char in lua:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += char
    return [argument.strip() for argument in arguments]


def test_the_table_of_counters_has_every_word_that_the_scripts_count() -> None:
    shown = {codes(row[0])[0]: set(codes(row[1])) for row in rows(text_of("keys.md"), "## Counters")}
    counted: dict[str, set[str]] = {"submissions": set(script("submit").outcomes), "executions": set()}
    for file in LUA.rglob("*.lua"):
        lua = file.read_text("utf-8")
        for family, word in re.findall(r"\bcount\('(\w+)', '(\w+)'\)", lua):
            counted.setdefault(family, set()).add(word)
        for word in re.findall(r"\bcount_end\('(\w+)'", lua):
            counted["executions"].add(word)
        for word in re.findall(r"\bdrop_(?:result|index)\(key, .*?'(\w+)'\)", lua):
            counted.setdefault("removals", set()).add(word)
    for family, word in re.findall(
        r'"stats", family="(\w+)"\), "(\w+)"', (ROOT / "rqarm" / "calls.py").read_text("utf-8")
    ):
        counted[family].add(word)
    for family, words in counted.items():
        assert shown[f"arm:stats:{family}"] == words, family


# --- faults -----------------------------------------------------------------------------------------------------------


def test_every_fault_is_there_and_each_test_that_it_names_exists() -> None:
    lines = [line for line in text_of("faults.md").split("## The rows", 1)[1].splitlines() if re.match(r"\| \d", line)]
    shown = {int(line.split("|")[1]): re.findall(r"`(test_\w+\.py)::(test_\w+)`", line) for line in lines}
    assert list(shown) == list(range(1, 76))
    assert [number for number, tests in shown.items() if not tests] == [28]
    for number, tests in shown.items():
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), f"row {number}: {file}::{name}"


# --- transitions ------------------------------------------------------------------------------------------------------


def test_the_table_of_verbs_has_every_script_with_its_outcome_words() -> None:
    shown = {
        verb: set(codes(words))
        for verbs, _, _, words in rows(text_of("transitions.md"), "## Verbs")
        for verb in codes(verbs)
    }
    assert shown == {each.name: set(each.outcomes) for each in all_scripts()}


def test_the_table_of_states_has_every_state() -> None:
    assert {codes(row[0])[0] for row in rows(text_of("transitions.md"), "## States")} == set(State)


# --- URIs -------------------------------------------------------------------------------------------------------------


def examples(kind: str) -> list[list[str]]:
    table = text_of("uri.md").split(f"\n{kind}:\n\n", 1)[1].split("\n\n", 1)[0]
    return rows(f"{kind}\n{table}", kind)


def test_the_examples_of_equal_uris_are_equal() -> None:
    for one, other, why in examples("Equal"):
        assert canonicalize(codes(one)[0]).key == canonicalize(codes(other)[0]).key, why


def test_the_examples_of_different_uris_are_different() -> None:
    for one, other, why in examples("Different"):
        assert canonicalize(codes(one)[0]).key != canonicalize(codes(other)[0]).key, why


def test_the_examples_of_refused_uris_are_refused() -> None:
    for text, why in examples("Refused"):
        try:
            canonicalize(codes(text)[0])
        except InvalidRequest:
            continue
        pytest.fail(f"{text} is not refused ({why})")


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    broken = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not leads_somewhere(page, link)]
    assert not broken


def leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_leads_to_every_page() -> None:
    index = text_of("index.md")
    assert [page.name for page in DOCS if page.name != "index.md" and f"({page.name})" not in index] == []


# --- code -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    code: str
    is_run: bool

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(r"(<!-- run -->\n)?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Block(page, line, match[2], match[1] is not None))
    return found


BLOCKS = blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_of_python_compiles(block: Block) -> None:
    compile("\n" * (block.line - 1) + block.code, block.page.name, "exec")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.is_run], ids=lambda block: block.name)
def test_the_blocks_that_are_marked_run(block: Block, url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    file = tmp_path / "block.py"
    file.write_text(block.code, "utf-8")
    # none of the caller's settings, and never his embedded server
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RQARM_", "RQ_"))}
    environ |= {"RQARM_URL": url, "PYTHONPATH": str(Path(rqarm.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(file)], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_pages_that_show_the_manager_or_handlers_have_blocks_that_run() -> None:
    run = {block.page.name for block in BLOCKS if block.is_run}
    assert run >= {"bulk.md", "handlers.md", "keys.md", "results.md", "transitions.md", "uri.md"}


# --- docker -----------------------------------------------------------------------------------------------------------


def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))


def test_docker_compose_has_the_services() -> None:
    services = compose()["services"]
    assert set(services) == {"valkey", "worker", "dashboard", "prometheus", "grafana"}
    assert services["worker"]["environment"]["RQARM_URL"].startswith("redis://valkey:")


def test_docker_compose_gives_valkey_what_the_server_check_wants() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    command = re.findall(r"^      - (.+)$", text.split("command:\n", 1)[1].split("healthcheck:", 1)[0], re.MULTILINE)
    words = [word.strip('"') for word in command]
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "valkey-server"
    assert flags == {
        "--maxmemory": "512mb",
        "--maxmemory-policy": "volatile-lru",
        "--appendonly": "yes",
        "--appendfsync": "everysec",
    }


def test_docker_copies_only_what_exists() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert "\nUSER rqarm\n" in dockerfile


# --- the ancestors ----------------------------------------------------------------------------------------------------


def test_every_ability_of_the_ancestors_is_held_by_a_test_that_exists() -> None:
    named = [codes(row[-1])[0] for row in rows(text_of("ancestors.md"), "## The ancestors")]
    assert len(named) >= 29
    there = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in there] == []

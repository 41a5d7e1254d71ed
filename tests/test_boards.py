"""What is deployed, not imported: boards, alerts, Prometheus' configuration, the compose file, rq-dashboard's settings.

There is no Grafana, Prometheus or Docker here. What can be wrong without them is checked: names of metrics and labels,
paths, commands, variables.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import promql
import pytest
import redis
import yaml
from drive import Rig
from test_docs import OTHER_VARIABLES
from test_metrics import empty

from rqarm import BatchRequest, metrics
from rqarm.cli import COMMANDS, main
from rqarm.config import Settings
from rqarm.inspect import QueueLine, Server

ROOT = Path(__file__).parent.parent
BOARDS = sorted((ROOT / "dashboards" / "grafana").glob("*.json"))
RULES = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "rqarm.rules.yml").read_text("utf-8"))
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
OURS = [name for name, service in COMPOSE["services"].items() if "build" in service]
#: panels of Grafana 11 and 12; the old ones (graph, singlestat, table-old) are gone
PANELS = {"row", "timeseries", "stat", "table", "bargauge"}
#: labels that Prometheus adds, and that histograms have
ADDED = {"job", "instance", "le"}


def known_labels() -> dict[str, set[str]]:
    """Name of each series that is rendered -> its labels; those of metrics without a sample are in docs/metrics.md."""
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    written = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(rqarm_\w+)` \| \w+ \| *([^|]*)\|", page, re.MULTILINE)
    }
    found: dict[str, set[str]] = {}
    for metric in metrics.metrics(empty()):
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for _, labels, _ in metric.samples:
            assert set(labels) - {"le"} <= written[metric.name], metric.name
        found |= {metric.name + end: written[metric.name] for end in ends}
    return found


SERIES = known_labels()


def expressions() -> Iterator[tuple[str, str]]:
    for path in BOARDS:
        for panel in panels(path):
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", target["expr"]
    for rule in alerts():
        yield rule["alert"], rule["expr"]


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["panels"]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda value: value[:40])
def test_every_expression_uses_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    names = set(re.findall(r"\brqarm_\w+", expression))
    assert names or "up{" in expression, where
    assert names <= set(SERIES)
    for name, matchers in re.findall(r"\b(rqarm_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+) *(?:=~|!~|!=|=)", matchers)) <= SERIES[name] | ADDED, where
    grouped = {label for by in re.findall(r"\bby *\(([^)]*)\)", expression) for label in re.findall(r"\w+", by)}
    assert grouped <= set.union(ADDED, *(SERIES[name] for name in names)), where
    assert balanced(expression), where


def balanced(expression: str) -> bool:
    opened = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for char in re.sub(r'"[^"]*"', "", expression):
        if char in "([{":
            opened.append(char)
        elif char in pairs and (not opened or opened.pop() != pairs[char]):
            return False
    return not opened


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda value: value[:40])
def test_counters_are_read_by_their_rate(where: str, expression: str) -> None:
    for name in re.findall(r"\brqarm_\w+_(?:total|bucket|sum|count)\b", expression):
        assert re.search(rf"(?:rate|increase)\({name}(?:\{{[^}}]*\}})?\[", expression), where


# -- boards


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.name)
def test_a_board_has_current_panels_and_its_data_source_is_a_variable(path: Path) -> None:
    board = json.loads(path.read_text("utf-8"))
    assert {panel["type"] for panel in board["panels"]} <= PANELS
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources), panel["title"]
        assert panel["description"], panel["title"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used - {"__rate_interval", "__range", "__all"} == set(variables)


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.name)
def test_no_panel_covers_another(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(path):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


# -- alerts


def test_there_is_an_alert_for_all_that_can_go_wrong() -> None:
    assert {rule["alert"] for rule in alerts()} == {
        "RqarmDown", "RqarmNoWorkers", "RqarmStaleQueue", "RqarmFailures", "RqarmLeasesOverdue", "RqarmResultsEvicted",
        "RqarmMemoryHigh", "RqarmDuplicateExecution",
    }  # fmt: skip


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_and_what_it_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby *\(([^)]*)\)", rule["expr"]))))
    assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= grouped


def queue(name: str = "arm", **changes: Any) -> QueueLine:
    line = QueueLine(name, 0, None, None, 0, 0, 0, None, None, 1)
    return replace(line, **changes)


def server(**changes: Any) -> Server:
    at_ease = Server("valkey", "9.1.2", 100, 1_000, 0.1, "volatile-lru", 3, 0, 0, 1, 1)
    return replace(at_ease, **changes)


#: alert -> what is then, and what is now; what is not named is as when all is well
ALARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "RqarmNoWorkers": ({}, {"queues": (queue(), queue("reports", waiting=3, workers=0))}),
    "RqarmStaleQueue": ({}, {"queues": (queue(waiting=1, oldest=601.0),)}),
    "RqarmFailures": (
        {"executions": {"completed": 90, "failed": 10, "crashed": 1}},
        {"executions": {"completed": 97, "failed": 12, "crashed": 2}},
    ),
    "RqarmLeasesOverdue": ({}, {"overdue": 1, "overdue_seconds": 61.0}),
    "RqarmResultsEvicted": ({}, {"server": server(evicted_keys=4)}),
    "RqarmMemoryHigh": ({}, {"server": server(used_memory=901)}),
    "RqarmDuplicateExecution": ({}, {"refusals": {"duplicate": 1}}),
}
#: what must not wake anybody
CALM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"queues": (queue(waiting=50, oldest=599.0),), "overdue": 1, "overdue_seconds": 59.0}),
    ({}, {"server": server(max_memory=0, memory_ratio=None)}),
    ({}, {"server": None}),
    # two of nine: too few to tell
    ({"executions": {"completed": 90}}, {"executions": {"completed": 97, "failed": 2}}),
    # old failures, old duplicates, old evictions
    *[({"executions": {"failed": 99}, "refusals": {"duplicate": 9}},) * 2],
    ({}, {"refusals": {"late": 5}}),
]


def firing(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The alerts that fire between two scrapes."""
    calm = replace(empty(), queues=(queue(),), server=server())
    scrapes = [
        promql.Scrape(metrics.render(replace(calm, **changes)), job="rqarm", instance="dashboard:9181")
        for changes in (before, now)
    ]
    return {rule["alert"] for rule in alerts() if promql.evaluate(rule["expr"], *scrapes)}


@pytest.mark.parametrize("alert", ALARMS)
def test_an_alert_fires_for_what_it_is_about_and_no_other_does(alert: str) -> None:
    assert firing(*ALARMS[alert]) == {alert}


def test_it_is_told_when_nothing_answers() -> None:
    nothing = promql.Scrape("", job="rqarm", instance="dashboard:9181")
    assert {rule["alert"] for rule in alerts() if promql.evaluate(rule["expr"], nothing, nothing)} == {"RqarmDown"}
    assert set(ALARMS) | {"RqarmDown"} == {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize(("before", "now"), CALM)
def test_nothing_fires_when_all_is_well(before: dict[str, Any], now: dict[str, Any]) -> None:
    assert firing(before, now) == set()


@pytest.mark.parametrize("expression", ["", "rqarm_up >", "topk(1, rqarm_up)", "rqarm_up @ 1", "1 > 2", "(rqarm_up"])
def test_what_is_not_understood_is_not_evaluated(expression: str) -> None:
    nothing = promql.Scrape("")
    with pytest.raises(SyntaxError):
        promql.evaluate(expression, nothing, nothing)


# -- paths between the files


def mounts(service: str) -> dict[str, Path]:
    """Path in the container -> file here."""
    binds = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"] if volume.startswith(".")]
    return {bind[1]: ROOT / bind[0] for bind in binds}


def test_what_is_mounted_is_there_and_read_only() -> None:
    for service in ("prometheus", "grafana"):
        assert all(path.exists() for path in mounts(service).values()), service
    binds = [v for each in COMPOSE["services"].values() for v in each.get("volumes", []) if v.startswith(".")]
    assert all(bind.endswith(":ro") for bind in binds)


def test_prometheus_finds_its_rules_its_target_and_its_token() -> None:
    found = mounts("prometheus")
    config = yaml.safe_load(found["/etc/prometheus/prometheus.yml"].read_text("utf-8"))
    assert [found[path].name for path in config["rule_files"]] == ["rqarm.rules.yml"]
    (job,) = config["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in alerts()[0]["expr"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"]
    assert port in COMPOSE["services"][host]["command"]
    assert host in COMPOSE["services"][host]["environment"]["RQARM_DASHBOARD_HOSTS"].split(",")
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    variable = COMPOSE["secrets"][secret]["environment"]
    assert variable in COMPOSE["services"][host]["environment"]


def test_grafana_finds_its_board_and_its_data_source() -> None:
    found = mounts("grafana")
    provisioning = found["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "rqarm.yml").read_text("utf-8"))["providers"]
    boards = [name for name in found if name.startswith(provider["options"]["path"] + "/")]
    assert [found[name] for name in boards] == BOARDS
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["type"] == "prometheus"


# -- the compose file and the image


def test_monitoring_is_a_profile_and_the_rest_is_not() -> None:
    profiles = {name: service.get("profiles", []) for name, service in COMPOSE["services"].items()}
    assert profiles == {
        "valkey": [], "worker": [], "dashboard": [], "prometheus": ["monitoring"], "grafana": ["monitoring"],
    }  # fmt: skip


def test_what_was_accepted_survives_a_restart_and_everything_comes_back() -> None:
    valkey = COMPOSE["services"]["valkey"]
    options = dict(itertools.pairwise(valkey["command"]))
    assert (options["--appendonly"], options["--maxmemory-policy"]) == ("yes", "volatile-lru")
    assert "valkey-data:/data" in valkey["volumes"]
    named = {volume.partition(":")[0] for each in COMPOSE["services"].values() for volume in each.get("volumes", [])}
    assert {name for name in named if not name.startswith(".")} == set(COMPOSE["volumes"])
    assert {service["restart"] for service in COMPOSE["services"].values()} == {"unless-stopped"}
    assert not any(service.get("image", "").endswith((":latest", "/")) for service in COMPOSE["services"].values())


@pytest.mark.parametrize("service", OURS)
def test_a_service_runs_a_command_of_ours_with_options_that_it_has(service: str) -> None:
    name, *arguments = COMPOSE["services"][service]["command"]
    if name == "dashboard" and name not in COMMANDS:
        pytest.skip("rqarm dashboard is not in this tree yet")
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= options


@pytest.mark.parametrize("service", OURS)
def test_a_service_gets_variables_that_somebody_reads(service: str) -> None:
    environment = COMPOSE["services"][service]["environment"]
    names = {name.removeprefix("RQARM_").lower() for name in environment if not name.startswith("RQARM_DASHBOARD_")}
    others = {name.removeprefix("RQARM_").lower() for name in OTHER_VARIABLES}
    assert names <= {field.name for field in fields(Settings)} | others
    options = {name.removeprefix("RQARM_DASHBOARD_").lower() for name in environment} - names
    options = {name for name in options if not name.startswith("rqarm_")}
    if options and find_spec("rqarm.dashboard"):
        from rqarm.dashboard.options import Options

        assert options <= {field.name for field in fields(Options)}


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_a_service_tells_its_health(service: str) -> None:
    kind, program, *arguments = COMPOSE["services"][service]["healthcheck"]["test"]
    assert kind == "CMD"
    if program == "python":
        assert arguments[0] == "-c"
        compile(arguments[1], "healthcheck", "exec")
        (port,) = re.findall(r"127\.0\.0\.1:(\d+)", arguments[1])
        assert port in COMPOSE["services"][service]["command"]


def test_nothing_is_open_to_the_network_and_nothing_has_a_password_in_the_file() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN", variable):
                assert value.startswith("${"), variable
                assert ":?" in value, variable


def test_the_image_is_built_of_wheels_with_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {extra for extras in re.findall(r"'(?:\.|rqarm)\[([\w,]+)\]'", text) for extra in extras.split(",")}
    assert named
    assert named <= set(project["optional-dependencies"])
    assert text.count("\nFROM ") == 2
    last = text.rpartition("\nFROM ")[2]
    assert "--no-index" in last
    assert last.index("\nUSER rqarm") < last.index("\nENTRYPOINT")
    assert "COPY" not in last, "no sources in the image that runs"


# -- rq-dashboard alone


def test_rq_dashboard_shows_our_jobs_and_unpickles_nothing(redis_client: redis.Redis, url: str, tmp_path: Path) -> None:
    pytest.importorskip("rq_dashboard", reason="no rq-dashboard here")
    key = Rig(redis_client).seed("pending", BatchRequest("/cities/FR")).key
    job = redis_client.hget(f"arm:status:{key}", "job_id")
    assert job is not None
    # a pickle that leaves a trace when somebody reads it
    trace = tmp_path / "unpickled"
    hostile = f"cbuiltins\nopen\n(V{trace}\nVw\ntR.".encode()
    redis_client.hset(
        "rq:job:hostile", mapping={"data": hostile, "meta": hostile, "created_at": "2026-01-01T00:00:00Z"}
    )
    program = f"""
import logging
from rq_dashboard.cli import make_flask_app
app = make_flask_app("rq_dashboard_config", None, None, "")
app.config["DEPRECATED_OPTIONS"] = []
client = app.test_client()
for job in ({job.decode()!r}, "hostile"):
    answer = client.get(f"/0/data/job/{{job}}.json")
    print(answer.status_code, answer.json.get("description") if answer.is_json else "")
print(app.config["RQ_DASHBOARD_DISABLE_DELETE"])
"""
    environment = {**os.environ, "RQARM_URL": url, "PYTHONPATH": str(ROOT / "dashboards")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[0] == "200 /cities/FR", done.stderr
    assert shown[-1] == "True"
    assert not trace.exists()


def test_the_configuration_of_rq_dashboard_never_imports_pickle() -> None:
    tree = ast.parse((ROOT / "dashboards" / "rq_dashboard_config.py").read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"json", "os"}

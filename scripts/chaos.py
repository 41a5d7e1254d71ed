#!/usr/bin/env python3
"""Hurt workers and server while requests flow, and see that nothing is lost and nothing counts twice.

    python scripts/chaos.py                        # all shows: about ten minutes
    python scripts/chaos.py kills --count 200 --seed 7
    python scripts/chaos.py --keep /tmp/chaos      # logs and notes stay there

Each show starts a server, workers and four clients of its own and touches nothing else. It prints what it did and what
it found; the exit code is 1 when something was violated. tests/test_chaos.py runs the same shows with small counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chaos  # noqa: E402 -- it is found by the line above

#: how often each show hurts
COUNTS = {"kills": 200, "stops": 60, "restarts": 20, "emptied": 20, "poison": 5, "rolling": 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shows", nargs="*", metavar="SHOW", help=f"{', '.join(COUNTS)}; all without one")
    parser.add_argument("--count", type=int, help="how often it hurts, instead of the show's own count")
    parser.add_argument("--distinct", type=int, help="distinct requests, instead of the show's own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory for logs and notes; a temporary one otherwise")
    options = parser.parse_args()
    if unknown := set(options.shows) - set(COUNTS):
        parser.error(f"no such show: {', '.join(sorted(unknown))}")
    violated = False
    with tempfile.TemporaryDirectory(prefix="rqarm-chaos-") as temporary:
        for name in options.shows or COUNTS:
            directory = (options.keep or Path(temporary)) / name
            directory.mkdir(parents=True, exist_ok=True)
            size = {"distinct": options.distinct} if options.distinct else {}
            report = chaos.SHOWS[name](directory, options.seed, options.count or COUNTS[name], **size)
            print(report, flush=True)
            violated |= bool(report.violations)
    return 1 if violated else 0


if __name__ == "__main__":
    raise SystemExit(main())

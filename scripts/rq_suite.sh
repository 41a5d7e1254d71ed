#!/usr/bin/env bash
# RQ's own test suite with rqarm.Worker in place of rq.Worker, compared with a run on RQ's own; see rq_suite.py --help.
# PYTHON names the interpreter, one in which rqarm's dependencies and pytest are installed.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/rq_suite.py" "$@"

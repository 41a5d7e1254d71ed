"""The mutation gate: break the system on purpose, one way at a time, and see that the tests notice.

    python scripts/mutants.py [NAME ...] [--tests tests/test_transitions.py tests/test_model.py ...]

Each mutant is the package with one piece of text replaced, in a copy. It is caught when the tests fail on it; those of
the worker name the tests that can notice them. Exit code 1 when one lives, or when its text is no longer in the source:
then write it anew, do not drop it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/test_transitions.py", "tests/test_submit.py", "tests/test_results.py", "tests/test_attempts.py",
    "tests/test_healing.py", "tests/test_line.py", "tests/test_emissions.py", "tests/test_limits.py",
    "tests/test_model.py", "tests/test_execution.py", "tests/test_waiting.py", "tests/test_browse.py",
    "tests/test_redirects.py", "tests/test_needs.py", "tests/test_callbacks.py",
]  # fmt: skip
HELD = "if claim.state ~= 'in_progress' or claim.token ~= token then"
NOT_FENCED = "if claim.state ~= 'in_progress' then"


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    #: that can notice it, when it is not those of all
    tests: tuple[str, ...] = ()


MUTANTS = [
    Mutant("complete-without-token", "lua/complete.lua", HELD, NOT_FENCED),
    Mutant("fail-without-token", "lua/fail.lua", HELD, NOT_FENCED),
    Mutant("emit-without-token", "lua/emit.lua", HELD, NOT_FENCED),
    Mutant("emit-twice-is-kept-twice", "lua/emit.lua", "if number < first + count then", "if false then"),
    Mutant("emit-keeps-everything", "lua/emit.lua", "while count > 1 and", "while false and"),
    Mutant("emit-with-a-gap", "lua/emit.lua", "count > 0 and number == first + count", "count > 0"),
    Mutant("emit-wakes-nobody", "lua/emit.lua", "redis.call('PUBLISH', told_name(key), 'emit')\n", ""),
    Mutant("emissions-of-a-dead-attempt", "lua/prelude/claims.lua", "  withdraw_emissions(key)\n  replay", "  replay"),
    Mutant(
        "emissions-of-a-dead-claim",
        "lua/prelude/claims.lua",
        "if not owner or owner ~= token then",
        "if not owner then",
    ),
    Mutant("renew-without-token", "lua/renew.lua", HELD, NOT_FENCED),
    Mutant("retry-without-token", "lua/retry.lua", HELD, NOT_FENCED),
    Mutant("release-without-token", "lua/release.lua", HELD, NOT_FENCED),
    Mutant("crash-without-lease-check", "lua/crash.lua", "(tonumber(claim.lease_until) or now_ms) <= now_ms", "true"),
    Mutant(
        "start-without-ticket-check",
        "lua/start.lua",
        "state == 'pending' and claim.job_id == job_id",
        "state == 'pending'",
    ),
    Mutant("start-runs-what-runs", "lua/start.lua", "elseif state == 'pending' and", "elseif state ~= 'completed' and"),
    Mutant("start-forgets-its-exec", "lua/start.lua", "claim.exec == exec", "false"),
    Mutant("start-leaves-its-own-ticket", "lua/start.lua", "if list ~= '' and", "if false and"),
    Mutant(
        "start-of-ones-own-starts-anew",
        "lua/start.lua",
        "claim.job_id == job_id and list == ''",
        "claim.job_id == job_id",
    ),
    Mutant("start-keeps-a-ttl", "lua/prelude/claims.lua", "  redis.call('PERSIST', status)\n", ""),
    Mutant("no-crash-limit", "lua/crash.lua", "if crashes >= max_attempts then", "if false then"),
    Mutant("submit-without-crash-limit", "lua/submit.lua", "strikes + 1 >= max_attempts", "false"),
    Mutant(
        "token-from-the-clock-alone",
        "lua/prelude/base.lua",
        "math.max(tonumber(redis.call('GET', seq_name()) or 0) + 1, now_us)",
        "now_us - now_us % 1000000",
    ),
    Mutant(
        "token-from-a-counter-alone",
        "lua/prelude/base.lua",
        "math.max(tonumber(redis.call('GET', seq_name()) or 0) + 1, now_us)",
        "tonumber(redis.call('GET', seq_name()) or 0) + 1",
    ),
    Mutant(
        "complete-keeps-the-lease",
        "lua/prelude/claims.lua",
        "-- /RARE\n  end\n  redis.call('ZREM', leases_name(), key)\nend",
        "-- /RARE\n  end\nend",
    ),
    Mutant(
        "no-wake-up",
        "lua/prelude/results.lua",
        "sticky)\n  wake(key, 'completed', is_small and envelope, bytes)\n",
        "sticky)\n",
    ),
    Mutant("commit-of-a-torn-result", "lua/complete.lua", "if missing > 0 then", "if false then"),
    Mutant(
        "chunks-keep-their-short-life",
        "lua/prelude/results.lua",
        "do expire_at(chunk_name(key, owner, n), deadline_ms) end",
        "do end",
    ),
    Mutant(
        "joiner-lowers-the-ttl",
        "lua/prelude/claims.lua",
        "if value > (tonumber(fields[field] or nil) or 0) then",
        "if value > 0 then",
    ),
    Mutant("hit-shortens-the-ttl", "lua/prelude/results.lua", "ttl_ms > 0 and wanted_ms > until_ms", "ttl_ms > 0"),
    Mutant(
        "sticky-gets-a-ttl",
        "lua/prelude/results.lua",
        "local deadline_ms = not sticky and now_ms + ttl_ms or nil",
        "local deadline_ms = now_ms + ttl_ms",
    ),
    Mutant(
        "submit-joins-a-lapsed-lease",
        "lua/submit.lua",
        "is_live = tonumber(flown.lease_until) > now_ms",
        "is_live = true",
    ),
    Mutant(
        "submit-joins-a-lost-ticket",
        "lua/submit.lua",
        "is_live = DELIVERED[redis.call('HGET', job_prefix .. flown.job_id, 'status') or '']",
        "is_live = true",
    ),
    Mutant(
        "submit-twice-queues-twice",
        "lua/submit.lua",
        "elseif state and claim.job_id == job_id then",
        "elseif false then",
    ),
    Mutant("submit-ignores-another-uri", "lua/submit.lua", "if state and known_uri ~= uri then", "if false then"),
    Mutant(
        "sweep-without-re-push",
        "lua/sweep.lua",
        "and not has_ticket(key, claim) then\n    report(ticketless, key, claim, claim.job_id)\n",
        "and not has_ticket(key, claim) then\n",
    ),
    Mutant(
        "sweep-takes-a-ticket-from-who-loads",
        "lua/sweep.lua",
        "if delivery == 'started' then return is_loading(key, claim) end",
        "if delivery == 'started' then return false end",
    ),
    Mutant(
        "sweep-waits-for-a-dead-loader",
        "lua/sweep.lua",
        "return now_ms < tonumber(seen_ms) + math.max(lease_ms, LOADING_MS) end",
        "return true end",
    ),
    Mutant(
        "sweep-forgets-a-lost-alias",
        "lua/sweep.lua",
        "    else\n      report(ticketless, key, claim, claim.job_id)\n",
        "    else\n",
    ),
    Mutant(
        "sweep-without-clamp",
        "lua/sweep.lua",
        "if tonumber(fields.lease_until) > now_ms + 2 * one then",
        "if false then",
    ),
    Mutant(
        "replaced-job-stays", "lua/prelude/claims.lua", " else retire(fields.job_id, job_id, commands) end\n", " end\n"
    ),
    Mutant("revive-whatever-is-queued", "lua/revive.lua", " or claim.job_id ~= old_job_id", ""),
    Mutant(
        "cancel-leaves-the-line",
        "lua/prelude/claims.lua",
        "    leave_line(key, fields)\n    -- /RARE\n",
        "    -- /RARE\n",
    ),
    Mutant(
        "load-is-never-given-back",
        "lua/prelude/line.lua",
        "    elseif est_ms > 0 then\n      add_load(fields.queue, fields.slot, int(-est_ms))\n",
        "",
    ),
    Mutant(
        "forget-in-flight", "lua/forget.lua", "if state == 'pending' or state == 'in_progress' then", "if false then"
    ),
    Mutant("admit-without-token", "lua/admit.lua", HELD, NOT_FENCED),
    Mutant("admit-whoever-asks", "lua/admit.lua", "if taken < max or displace() then", "if true then"),
    Mutant(
        "admit-parks-when-asked-again",
        "lua/admit.lua",
        "if claim.limit == limit and redis.call('ZSCORE'",
        "if false and redis.call('ZSCORE'",
    ),
    Mutant(
        "admit-overtakes-who-was-called",
        "lua/admit.lua",
        "redis.call('ZCARD', running_name(limit)) + redis.call('ZCARD', called_name(limit))",
        "redis.call('ZCARD', running_name(limit))",
    ),
    Mutant("admit-displaces-anybody", "lua/admit.lua", "if score > behind then", "if not last then"),
    Mutant("admit-keeps-a-place-for-ever", "lua/admit.lua", "< now_ms - KEPT_MS then", "< 0 then"),
    Mutant(
        "admit-ignores-new-places",
        "lua/admit.lua",
        "first those who wait.\ncall_up(limit)\n",
        "first those who wait.\n",
    ),
    Mutant("park-counts-an-attempt", "lua/admit.lua", "redis.call('HINCRBY', status, 'attempts', -1)\n", ""),
    Mutant(
        "an-end-keeps-its-place",
        "lua/prelude/claims.lua",
        "    vacate(key, fields.limit)\n    -- /RARE\n",
        "    -- /RARE\n",
    ),
    Mutant(
        "a-retry-keeps-its-place",
        "lua/prelude/claims.lua",
        "  if fields.limit then vacate(key, fields.limit) end\n"
        "  redis.call('ZREM', leases_name(), key)\n  local ticket",
        "  redis.call('ZREM', leases_name(), key)\n  local ticket",
    ),
    Mutant("a-free-place-calls-nobody", "lua/prelude/line.lua", "key)\n  call_up(limit)\n", "key)\n"),
    Mutant("the-last-in-line-is-called", "lua/prelude/line.lua", "'ZPOPMIN'", "'ZPOPMAX'"),
    Mutant(
        "whatever-is-parked-is-called",
        "lua/prelude/line.lua",
        "if fields.state == 'pending' and fields.limit == limit and fields.recall then",
        "if fields then",
    ),
    Mutant(
        "a-call-that-fails-stops-the-end",
        "lua/prelude/line.lua",
        "pcall(replay, chosen[i].recall, chosen[i].recall_data)",
        "replay(chosen[i].recall, chosen[i].recall_data)",
    ),
    Mutant(
        "who-was-called-must-ask-anew",
        "lua/prelude/line.lua",
        "redis.call('ZREM', called_name(limit), key) == 1",
        "false",
    ),
    Mutant("sweep-keeps-lost-places", "lua/sweep.lua", "  check_limits()\n", ""),
    Mutant(
        "worker-asks-for-no-place",
        "worker/execution.py",
        "if route.max_running is not None and not",
        "if False and not",
    ),
    Mutant(
        "take-passes-over-what-is-foreign",
        "lua/take.lua",
        "if taken or foreign then break end",
        "if taken then break end",
    ),
    Mutant(
        "take-swallows-foreign-jobs",
        "lua/take.lua",
        "redis.call('EXISTS', job_prefix .. job_id) == 1 and not is_ours(job_id)",
        "false",
    ),
    Mutant("take-stops-at-foreign-records", "lua/take.lua", "if values.err then return nil, job_id end\n", ""),
    Mutant("a-suspended-worker-takes", "lua/take.lua", "redis.call('EXISTS', suspended) == 1", "false"),
    Mutant("take-deletes-the-job-of-what-starts", "lua/take.lua", "not (is_next and is_worker)", "true"),
    Mutant(
        "take-deletes-the-job-of-what-runs",
        "lua/take.lua",
        "claim.state == 'in_progress' and claim.job_id == job_id",
        "false",
    ),
    Mutant("take-leaves-the-jobs-of-old-tickets", "lua/take.lua", "if not is_running and not", "if false and not"),
    Mutant("take-starts-two-for-one-execution", "lua/take.lua", "if last_exec == exec then", "if false then"),
    Mutant(
        "an-attempt-leaves-its-job",
        "lua/prelude/claims.lua",
        "if job and job ~= '' then redis.call('UNLINK', job) else",
        "if false then else",
    ),
    Mutant("complete-leaves-its-job", "lua/complete.lua", "if job ~= '' then gone[2] = job end\n", ""),
    # redirects, callbacks, the quarantine
    Mutant("a-redirect-without-token", "lua/redirect.lua", HELD, NOT_FENCED),
    Mutant(
        "aliases-without-end", "lua/prelude/aliases.lua", "local MOST_ALIASES = 1000", "local MOST_ALIASES = 100000"
    ),
    Mutant(
        "who-needs-is-never-called",
        "lua/prelude/aliases.lua",
        "  pcall(replay, fields.recall, fields.recall_data)\n",
        "",
    ),
    Mutant(
        "who-needs-two-is-called-by-one",
        "lua/prelude/aliases.lua",
        "if left ~= '\\n' then return",
        "if false then return",
    ),
    Mutant("two-that-need-each-other", "lua/need.lua", "if chain then", "if false then"),
    Mutant("a-need-without-token", "lua/need.lua", HELD, NOT_FENCED),
    Mutant("a-redirect-loop", "lua/redirect.lua", "if target == key or IN_FLIGHT", "if false and IN_FLIGHT"),
    Mutant("an-alias-sleeps-on", "lua/prelude/results.lua", "  complete_aliases(led_by(key), key, deadline_ms)\n", ""),
    Mutant(
        "an-alias-outlives-its-root",
        "lua/prelude/quarantine.lua",
        "  end_all_led_by(key, 'failed', err, negative_until)\n",
        "",
    ),
    Mutant("an-alias-keeps-its-payloads", "lua/redirect.lua", "  move_payloads(key, root)\n", ""),
    Mutant("a-cached-target-without-callback", "lua/redirect.lua", "followers('callback'), claim", "{}, claim"),
    Mutant(
        "a-callback-without-payloads",
        "lua/prelude/followups.lua",
        "redis.call('RENAME', callbacks_name(key), callbacks_name(follow_up))",
        "redis.call('UNLINK', callbacks_name(key))",
    ),
    Mutant("a-follow-up-is-kept", "lua/conclude.lua", "erase(key, job)\n", ""),
    Mutant("a-decision-about-another-failure", "lua/requeue.lua", "claim.job_id ~= old_job_id", "false"),
    Mutant(
        "an-exhausted-one-blocks",
        "lua/prelude/quarantine.lua",
        "poison = true, asked = true}",
        "poison = true, asked = true, exhausted = true}",
    ),
    Mutant(
        "search-finds-what-has-moved-on",
        "lua/search.lua",
        "if kind and not belongs(kind",
        "if false and not belongs(kind",
    ),
    Mutant("search-looks-without-bound", "lua/search.lua", "found >= limit or looked_at >= most", "found >= limit"),
    Mutant(
        "search-trusts-the-rank",
        "lua/prelude/search.lua",
        "if redis.call('ZSCORE', index, member) == score then",
        "if true then",
    ),
    Mutant(
        "search-skips-when-its-last-is-gone",
        "lua/prelude/search.lua",
        "return redis.call('ZCOUNT', index, '(' .. score, '+inf') end",
        "return redis.call('ZCARD', index) end",
    ),
    Mutant(
        "search-tells-secrets",
        "browse/search.py",
        "shown = redact(entry.uri, core.settings.secret_params).lower()",
        "shown = entry.uri.lower()",
    ),
    Mutant(
        "a-route-is-any-beginning",
        "lua/prelude/search.lua",
        "return stop and (stop == #uri + 1 or string.find(uri, '^[/?#:]', stop) ~= nil) or false",
        "return stop ~= nil",
    ),
    Mutant(
        "retain-leaves-the-pieces",
        "lua/retain.lua",
        "set_deadline(holder, ttl_ms > 0 and now_ms + ttl_ms or nil)",
        "expire_together(holder, '', 0, ttl_ms > 0 and now_ms + ttl_ms or nil)",
    ),
    Mutant("retain-where-nothing-is", "lua/retain.lua", "or redis.call('EXISTS', result_name(holder)) == 0", ""),
    Mutant("invalidate-by-old-tags", "lua/invalidate.lua", "if not has_tag(fields.tags, tag) then", "if false then"),
    Mutant(
        "invalidate-drops-what-runs",
        "lua/invalidate.lua",
        "elseif fields.state == 'completed' then",
        "elseif true then",
    ),
    Mutant("tags-grow-for-ever", "lua/prelude/search.lua", "redis.call('ZRANGE', tagged_name(), 0, 1)", "{}"),
    Mutant(
        "put-keeps-old-tags",
        "lua/put.lua",
        "if claim.state then redis.call('HDEL', status, 'tags', 'traced') end\n",
        "",
    ),
    Mutant(
        "clear-without-its-route",
        "lua/clear.lua",
        "return route == '' or is_on_route(uri_of(fields), route, pattern)",
        "return true",
    ),
    Mutant(
        "clear-temporary-takes-sticky-ones",
        "lua/clear.lua",
        "redis.call('ZCOUNT', results, '-inf', to) - rank",
        "redis.call('ZCARD', results) - rank",
    ),
    Mutant(
        "failures-without-bound",
        "lua/prelude/claims.lua",
        "  redis.pcall('ZREMRANGEBYRANK', ended_name(state), 0, -ENDED_KEPT - 1)\n",
        "",
    ),
    Mutant("failed-for-ever", "lua/prelude/quarantine.lua", "  redis.pcall('ZREM', ended_name('failed'), key)\n", ""),
    Mutant("attempts-without-bound", "lua/prelude/claims.lua", "number % ATTEMPTS_KEPT, note", "number, note"),
    Mutant("retry-leaves-no-note", "lua/retry.lua", "note_attempt(key, claim, 'retried', err)\n", ""),
    Mutant("attempt-of-nobody", "lua/crash.lua", ", 'worker', 'started_ms')", ")"),
    Mutant("inspect-looks-at-the-end-only", "lua/inspect.lua", "if time ~= '' then note", "if false then note"),
    Mutant(
        "late-take-of-an-earlier-turn", "lua/take.lua", "elseif is_older(exec, last_exec) then", "elseif false then"
    ),
    Mutant("execution-starts-twice", "lua/take.lua", "  is_spent = not taken\n", ""),
    Mutant(
        "take-of-the-dead-stays-open",
        "lua/take.lua",
        "  redis.call('HSET', takers_name(), taker, exec .. ' ' .. NOTHING)\n",
        "",
    ),
    Mutant("value-of-another-claim", "listen.py", 'said if self.stands(waiter) else b""', "said"),
    Mutant("reader-leaves-nobody-behind", "listen.py", "next(iter(self._asleep)).ring()", "pass"),
    Mutant("waiter-reads-before-it-listens", "flows.py", "    else:\n        yield Watch(tuple(waiting))\n", ""),
    Mutant(
        "waiter-trusts-the-wake-up",
        "flows.py",
        "if not asked or (at_once and",
        "if (at_once and",
    ),
    Mutant(
        "horse-dies-when-nobody-can-connect",
        "shell.py",
        "            if connection is not None:\n                connection.disconnect()",
        "            assert connection is not None\n            if True:\n                connection.disconnect()",
        ("tests/test_partition.py", "-k", "nobody_can_connect"),
    ),
    Mutant(
        "lanes-forget-what-they-asked-for",
        "worker/horse.py",
        "        self.is_unanswered = True\n",
        "",
        ("tests/test_crash_points.py", "-k", "costs_no_execution and completed-3"),
    ),
    Mutant(
        "guard-kills-nobody",
        "worker/stable.py",
        "if was_awake and any(",
        "if False and any(",
        ("tests/test_partition.py", "-k", "in_silence"),
    ),
    Mutant(
        "confirmed-before-it-was-said",
        "shell.py",
        "if i in unknown or isinstance(steps[i], Command)]",
        "if i in unknown]",
        ("tests/test_durability.py", "-k", "sent_again"),
    ),
    Mutant(
        "durable-whatever-is-said",
        "calls.py",
        "int(reply[0]) >= 1",
        "int(reply[0]) >= 0",
        ("tests/test_durability.py", "-k", "in_time"),
    ),
    Mutant(
        "subscription-behind-the-submit",
        "flows.py",
        "    if core.habit.waits:\n",
        "    if False:\n",
        ("tests/test_waiting.py", "-k", "before_the_next_submit"),
    ),
    Mutant(
        "horse-stays-lone-in-a-crowd",
        "worker/horse.py",
        "self._is_lone = not (isinstance(taken, Taken) and taken.left)",
        "self._is_lone = True",
        ("tests/test_horse.py", "-k", "much_comes_at_once"),
    ),
    Mutant(
        "guard-minds-what-was-handed-back",
        "worker/stable.py",
        '.death != "ahead"]',
        '.death != "nothing"]',
        ("tests/test_horse.py", "-k", "for_no_lease_but_its_own"),
    ),
    Mutant(
        "guard-renews-nothing",
        "worker/stable.py",
        "self._renew([run for run in runs if not run.death and now - run.renewed >= due], now)",
        "del due",
        ("tests/test_partition.py", "-k", "half_open"),
    ),
    Mutant(
        "old-master-is-asked-again",
        "connect.py",
        "if not self._sock:",
        "if False:",
        ("tests/test_failover.py", "-k", "old_master"),
    ),
    Mutant(
        "clock-steps-untold",
        "worker/rqworker.py",
        "abs(self._offset - before) > self.settings.lease",
        "False",
        ("tests/test_clock.py", "-k", "put_forward"),
    ),
    Mutant(
        "unreadable-counts-as-an-attempt",
        "worker/horse.py",
        "            with contextlib.suppress(LeaseLost):  # then somebody else sees to it\n",
        "            if False:\n",
        ("tests/test_versions.py",),
    ),
]


def caught(mutant: Mutant, tests: list[str]) -> bool:
    with tempfile.TemporaryDirectory(prefix="rqarm-mutant-") as directory:
        package = Path(directory) / "rqarm"
        shutil.copytree(ROOT / "rqarm", package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "examples", "docs", "pyproject.toml"):
            os.symlink(ROOT / name, Path(directory) / name)
        source = package / mutant.path
        text = source.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.path}")
        source.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        # an installed rqarm must not shadow the mutant
        environment = {**os.environ, "PYTHONPATH": directory}
        run = subprocess.run(command, cwd=directory, env=environment, capture_output=True, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: the tests did not run:\n{run.stdout.decode()[-2000:]}")
        return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    wanted = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    alive = []
    for mutant in wanted:
        is_caught = caught(mutant, list(mutant.tests) or options.tests)
        print(f"{'caught' if is_caught else 'ALIVE ':<8}{mutant.name}", flush=True)
        if not is_caught:
            alive.append(mutant.name)
    print(f"\n{len(wanted) - len(alive)} of {len(wanted)} caught")
    raise SystemExit(1 if alive else 0)


if __name__ == "__main__":
    main()

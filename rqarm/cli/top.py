"""``rqarm top``: the overview in a terminal, again and again."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import click
from redis.exceptions import RedisError

from rqarm.cli.common import Target, complain, is_terminal, on_server
from rqarm.errors import RqarmError
from rqarm.inspect import Attention, HitRate, Overview
from rqarm.text import duration, plain, size

#: bars of the last hour, from nothing to the highest minute
BARS = " ▁▂▃▄▅▆▇█"
#: without UTF-8
PLAIN_BARS = " .:-=+*#%"
HOME_AND_CLEAR, HIDE, SHOW = "\x1b[H\x1b[J", "\x1b[?25l", "\x1b[?25h"
#: width of a line that goes to a file
UNCUT = 1_000
COLOURS = {"critical": "red", "warning": "yellow"}


@click.command()
@on_server
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option(
    "--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="Seconds between two looks."
)
def top(target: Target, once: bool, interval: float) -> None:
    """Watch queues, hit rate, cache and failures.

    One round trip a frame. Ctrl-C ends it. Where the output is no terminal, frames follow each other, without colours.
    """
    is_live = is_terminal(sys.stdout) and not once
    with target.manager() as rm:
        if once:
            _show(rm.overview(), is_live=False)
            return
        try:
            if is_live:
                click.echo(HIDE, nl=False)
            while True:
                _look(rm.overview, is_live)
                time.sleep(interval)
        except KeyboardInterrupt:
            return
        finally:
            if is_live:
                click.echo(SHOW)


def _look(overview: Callable[[], Overview], is_live: bool) -> None:
    """One frame; a server that does not answer now may do so in the next one."""
    try:
        found = overview()
    except (RedisError, RqarmError) as error:
        if is_live:
            click.echo(HOME_AND_CLEAR, nl=False)
        complain(str(error))
        return
    _show(found, is_live)


def _show(found: Overview, is_live: bool) -> None:
    columns, rows = shutil.get_terminal_size()
    lines = list(frame(found, columns if is_terminal(sys.stdout) else UNCUT))
    if is_live:
        lines = lines[: rows - 1]
    click.echo((HOME_AND_CLEAR if is_live else "") + "\n".join(lines))


def frame(found: Overview, width: int) -> Iterator[str]:
    """The lines of one frame, none wider than ``width``; colours go where there is a terminal."""
    clock = time.strftime("%H:%M:%S", time.localtime(found.at))
    server = f"{found.server.name} {found.server.version}" if found.server else "server unknown"
    yield _cut(f"rqarm {found.version}  {clock}  namespace {found.namespace}  {server}", width)
    for each in found.attention:
        yield _styled(each, _cut(f"! {each.text}", width))
    yield ""
    yield from (_cut(line, width) for line in _sums(found))
    yield ""
    yield _cut("submissions per minute, last hour", width)
    yield from (_cut(line, width) for line in _series(found))
    yield ""
    yield from (_cut(line, width) for line in _queues(found))
    if found.hot:
        yield ""
        yield "hot keys"
        yield from (_cut(f"{hot.hits:>7}  {size(hot.bytes):>10}  {plain(hot.uri)}", width) for hot in found.hot[:5])


def _styled(each: Attention, text: str) -> str:
    return click.style(text, fg=COLOURS.get(each.level), bold=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + _mark()


def _mark() -> str:
    return "…" if _speaks_utf8() else ">"


def _speaks_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def _sums(found: Overview) -> Iterator[str]:
    states, cache, server = found.states, found.cache, found.server
    parked = f" ({states['parked']} parked)" if states["parked"] else ""
    yield (
        f"requests   {states['pending']} waiting{parked}, {states['in_progress']} running, "
        f"{states['completed']} cached, {states['quarantined']} quarantined"
    )
    yield f"last hour  {_ratio(found.hit_rate_hour)}"
    yield f"ever       {_ratio(found.hit_rate)}"
    yield f"saved      {found.saved.executions} executions, {duration(found.saved.seconds)} of work"
    memory = "server memory unknown"
    if server is not None:
        limit = f" of {size(server.max_memory)} ({server.memory_ratio:.0%})" if server.memory_ratio is not None else ""
        memory = f"server {size(server.used_memory)}{limit}, {server.evicted_keys} evicted"
    yield f"cache      {cache.temporary} temporary, {cache.sticky} sticky, {size(cache.bytes)}; {memory}"
    ends = ", ".join(f"{count} {word}" for word, count in found.executions.items()) or "none yet"
    yield f"executions {ends}"
    yield f"workers    {found.workers.total}, {found.workers.busy} busy"


def _ratio(rate: HitRate) -> str:
    if not rate.total:
        return "no submissions"
    parts = f"hit {rate.hit_ratio:.0%}, joined {rate.joined_ratio:.0%}, new {rate.new_ratio:.0%}"
    return f"{rate.effective:.0%} answered without a run of their own ({parts}; {rate.total} in all)"


def _series(found: Overview) -> Iterator[str]:
    bars = BARS if _speaks_utf8() else PLAIN_BARS
    for word in ("hit", "joined", "new"):
        counts = [minute.submissions.get(word, 0) for minute in found.minutes]
        most = max(counts)
        line = "".join(bars[-(-count * (len(bars) - 1) // most) if most else 0] for count in counts)
        yield f"  {word:<7}|{line}| {sum(counts)}, at most {most}"


def _queues(found: Overview) -> Iterator[str]:
    heads = ("queue", "waiting", "oldest", "tail eta", "running", "ok", "failed", "p50", "p95", "workers")
    rows: list[Sequence[str]] = [heads]
    for queue in found.queues:
        times = (queue.oldest, queue.tail_eta)
        runs = (queue.run_p50, queue.run_p95)
        counts = (queue.running, queue.completed, queue.failed)
        cells = (plain(queue.name), str(queue.waiting), *map(_time, times), *map(str, counts), *map(_time, runs))
        rows.append((*cells, str(queue.workers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join((row[0].ljust(widths[0]), *numbers))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else duration(seconds)

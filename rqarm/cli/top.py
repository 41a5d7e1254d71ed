"""``rqarm top``: the overview in a terminal, again and again."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
from redis.exceptions import RedisError

from rqarm.cli.common import Target, complain, is_terminal, on_server
from rqarm.errors import RqarmError
from rqarm.inspect import Attention, HitRate, Overview
from rqarm.text import brief, duration, plain, size

#: bars of the last hour, from nothing to the highest minute
BARS = " ▁▂▃▄▅▆▇█"
#: without UTF-8
PLAIN_BARS = " .:-=+*#%"
HOME_AND_CLEAR = "\x1b[H\x1b[J"
#: another screen without a cursor, and back to the one from before
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
#: what is read when a key ends it, q or Escape, or the terminal is gone; whole, since an arrow begins with ESC too
QUIT = (b"q", b"Q", b"\x1b", b"")
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

    One round trip a frame. The keys q, Esc and Ctrl-C end it. Where the output is no terminal, frames follow each
    other, without colours.
    """
    is_live = is_terminal(sys.stdout) and not once
    with target.manager() as rm:
        if once:
            _show(rm.overview(), is_live=False)
            return
        try:
            with _screen(is_live) as pause:
                while True:
                    _look(rm.overview, is_live, interval)
                    if not pause(interval):
                        return
        except KeyboardInterrupt:
            return


@contextmanager
def _screen(is_live: bool) -> Iterator[Callable[[float], bool]]:
    """A screen of its own while it runs. Gives what waits for the next frame: until the time is over or the window has
    another size; False = a key has ended it."""
    if not (is_live and is_terminal(sys.stdin)):
        yield _sleep
        return
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    resized, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGWINCH, lambda *_: None)  # a handler there must be, or nothing wakes
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def pause(seconds: float) -> bool:
        ready, _, _ = select.select([keys, resized], [], [], seconds)
        if resized in ready:
            os.read(resized, 1_024)
        return keys not in ready or os.read(keys, 64) not in QUIT

    try:
        tty.setcbreak(keys)
        click.echo(ENTER, nl=False)
        yield pause
    finally:
        click.echo(LEAVE, nl=False)
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        os.close(resized)
        os.close(wake)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _look(overview: Callable[[], Overview], is_live: bool, interval: float) -> None:
    """One frame; a server that does not answer now may do so in the next one."""
    try:
        found = overview()
    except (RedisError, RqarmError) as error:
        if is_live:
            click.echo(HOME_AND_CLEAR, nl=False)
        complain(f"{error} (looking again every {interval:g} s)")
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
    # what a low window cuts off stands last
    yield ""
    yield from (_cut(line, width) for line in _queues(found))
    yield ""
    yield from (_cut(line, width) for line in _sums(found))
    yield ""
    yield _cut("submissions per minute, last hour", width)
    yield from (_cut(line, width) for line in _series(found))
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
        f"{states['completed']} cached, {states['failed']} failed, {states['cancelled']} cancelled, "
        f"{states['quarantined']} quarantined"
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
    return "-" if seconds is None else brief(seconds)

"""The command line: ``rqarm``. Every command goes through the same manager as everybody else.

``COMMANDS`` says where each command is; its module is imported when the command is run, not for ``rqarm --help``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from rqarm.cli.common import guarded, server_options

#: name -> where it is, and its line in ``rqarm --help`` (a test holds it against the command's own)
COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("rqarm.cli.requests:submit", "Submit a request, and wait for its value if you like."),
    "status": ("rqarm.cli.requests:status", "Show what is known of a request."),
    "result": ("rqarm.cli.requests:result", "Write the value of a request."),
    "wait": ("rqarm.cli.requests:wait", "Wait until requests have ended."),
    "follow": ("rqarm.cli.follow:follow", "Show what a request emits and how far it is, then its value."),
    "ls": ("rqarm.cli.requests:ls", "List requests: what waits and runs, or one state."),
    "search": ("rqarm.cli.browse:search", "Find requests by key, URI or a part of it, state, route, tag."),
    "inspect": ("rqarm.cli.browse:inspect", "Show everything that is known of a request."),
    "claims": ("rqarm.cli.browse:claims", "List what runs: holder, lease, last sign of life."),
    "release": ("rqarm.cli.browse:release", "Take running requests away from their workers."),
    "workers": (
        "rqarm.cli.browse:workers",
        "List the RQ workers of our queues: state, requests in hand, counts, heartbeat.",
    ),
    "cancel": ("rqarm.cli.requests:cancel", "End requests for everybody who waits for them."),
    "forget": ("rqarm.cli.requests:forget", "Drop ended requests with their results."),
    "key": ("rqarm.cli.requests:key", "Print the key of a request; it needs no server."),
    "quarantine": ("rqarm.cli.quarantine:quarantine", "Look at failed requests that were set aside, and decide."),
    "cache": ("rqarm.cli.cache:cache", "Look at cached results, keep them, and clear them."),
    "stats": ("rqarm.cli.cache:stats", "Print counters and sizes of the namespace."),
    "top": ("rqarm.cli.top:top", "Watch queues, hit rate, cache and failures."),
    "worker": ("rqarm.cli.worker:worker", "Run requests: an RQ worker with your handlers."),
    "dashboard": (
        "rqarm.cli.dashboard:dashboard",
        "Serve the dashboard: queues, requests, cache, claims, quarantine, workers.",
    ),
    "sweep": ("rqarm.cli.requests:sweep", "Set going again what died in a queue without a word."),
    "check": ("rqarm.cli.check:check", "Say whether server, workers and queues are well."),
    "server": ("rqarm.cli.server:server", "The embedded server of this user."),
    "demo": ("rqarm.cli.demo:demo_command", "Show rqarm at work on this machine."),
}

EPILOG = """
Exit codes: 0 done; 1 failed, cancelled, unknown; 2 wrong usage; 3 not ready yet, or time over; 4 no server; 130 Ctrl-C.
A KEY can be given as the URI that was submitted. Without a URL the embedded server is used, and started.
RQARM_<SETTING> sets any setting; RQARM_DEBUG=1 shows tracebacks.
"""


class LazyGroup(click.Group):
    """The commands of COMMANDS, imported when they are called for; errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (place, _) in COMMANDS.items() if find_spec(place.partition(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, from the table instead of the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        for line in (self.epilog or "").strip().splitlines():
            formatter.write_text(line)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", "rqarm")
        sys.exit(guarded(lambda: super(LazyGroup, self).main(*args, **kwargs)))


def _print_version(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        from rqarm import __version__

        click.echo(f"rqarm {__version__}")
        ctx.exit()


main = LazyGroup(
    "rqarm",
    help="rqarm: slow requests run once, everybody gets the answer.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        *server_options(),
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_print_version,
            help="Print the version.",
        ),
    ],
)

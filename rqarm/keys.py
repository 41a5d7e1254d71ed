"""Every key name of ours, for Python and for the scripts.

The only module that spells one. ``Keys`` gives the names to Python; ``lua_names`` writes the same table as Lua
functions, which the loader puts before every script, so the two sides cannot differ. RQ's own names are not here:
rqarm.rqjobs asks RQ for them.
"""

from __future__ import annotations

from rqarm.model import Key

#: name -> pattern behind the namespace; what a part in braces stands for is the argument of the same name.
PATTERNS: dict[str, str] = {
    "status": "status:{key}",
    "lock": "lock:{key}",
    "result": "result:{key}",
    "chunk": "chunk:{key}:{owner}:{n}",
    "callbacks": "callbacks:{key}",
    "done": "done:{key}",
    "pending": "pending:{queue}",
    "load": "load:{queue}",
    "queues": "queues",
    "leases": "leases",
    "results": "results",
    "sizes": "sizes",
    "quarantine": "quarantine",
    "takers": "takers",
    "seq": "seq",
    "events": "events",
    "stats": "stats:{family}",
}

#: fields of the status hash that a reader gets, in this order, from every script that answers with a record
RECORD_FIELDS: tuple[str, ...] = (
    "state",
    "uri",
    "queue",
    "priority",
    "sticky",
    "submitted_ms",
    "started_ms",
    "ended_ms",
    "attempts",
    "est_ms",
    "progress",
    "worker",
    "error",
    "quarantined",
    "request",
)


class Keys:
    """The names inside one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.prefix = f"{namespace}:"
        self.pubsub_prefix = self.prefix + "done:"

    def status(self, key: Key) -> str:
        return f"{self.prefix}status:{key}"

    def done(self, key: Key) -> str:
        return f"{self.prefix}done:{key}"

    def chunk(self, key: Key, owner: str, n: int) -> str:
        return f"{self.prefix}chunk:{key}:{owner}:{n}"

    def named(self, kind: str, **parts: str) -> str:
        """Any name of the table: ``named("pending", queue="arm")``."""
        return self.prefix + PATTERNS[kind].format(**parts)


def lua_names() -> str:
    """The table as Lua: ``status_name(key)``, ``leases_name()``, each ``PREFIX .. pattern``."""
    lines = ["local PREFIX = ARGV[1]"]
    for kind, pattern in PATTERNS.items():
        parts = [part.split("}") for part in pattern.split("{")]
        arguments = [part[0] for part in parts[1:]]
        pieces = ["PREFIX", repr(parts[0][0])]
        for argument, literal in parts[1:]:
            pieces.append(argument)
            if literal:
                pieces.append(repr(literal))
        lines.append(f"local function {kind}_name({', '.join(arguments)}) return {' .. '.join(pieces)} end")
    fields = ", ".join(repr(field) for field in RECORD_FIELDS)
    lines.append(f"local RECORD_FIELDS = {{{fields}}}")
    return "\n".join(lines) + "\n"

"""Every key name of ours, for Python and for the scripts.

The only module that spells one. ``Keys`` gives the names to Python; ``expand_names`` writes the same table into the
scripts, so the two sides cannot differ. RQ's own names are not here:
rqarm.rqjobs asks RQ for them.
"""

from __future__ import annotations

import re

from rqarm.model import Key

#: name -> pattern behind the namespace; what a part in braces stands for is the argument of the same name.
PATTERNS: dict[str, str] = {
    "status": "status:{key}",
    "result": "result:{key}",
    "chunk": "chunk:{key}:{owner}:{n}",
    "callbacks": "callbacks:{key}",
    "followup": "followup:{key}",
    "done": "done:{key}",
    "told": "done:{key}:told",
    "emitted": "emitted:{key}",
    "traces": "traces:{key}",
    "pending": "pending:{queue}",
    "load": "load:{queue}",
    "queues": "queues",
    "leases": "leases",
    "results": "results",
    "sizes": "sizes",
    "quarantine": "quarantine",
    "ended": "ended:{state}",
    "tag": "tag:{tag}",
    "tagged": "tagged",
    "unattended": "unattended:{follow_up}",
    "aliases": "aliases:{key}",
    "redirected": "redirected",
    "limits": "limits",
    "running": "running:{limit}",
    "called": "called:{limit}",
    "parked": "parked:{limit}",
    "swept": "swept",
    "takers": "takers",
    "seq": "seq",
    "events": "events",
    "stats": "stats:{family}",
    "noted": "noted:{family}",
}

#: fields of the status hash that a reader gets, in this order, from every script that answers with a record
RECORD_FIELDS: tuple[str, ...] = (
    "state",
    "uri",
    "uri_2",
    "uri_3",
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
    "alias",
)

#: those of them that hold the identity, in pieces
URI_FIELDS: tuple[str, ...] = ("uri", "uri_2", "uri_3")


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

    @staticmethod
    def told(key: Key) -> Key:
        """What a follower watches beside the key: a key cannot hold a colon, so it is nobody's."""
        return Key(f"{key}:told")

    def chunk(self, key: Key, owner: str, n: int) -> str:
        return f"{self.prefix}chunk:{key}:{owner}:{n}"

    def named(self, kind: str, **parts: str) -> str:
        """Any name of the table: ``named("pending", queue="arm")``."""
        return self.prefix + PATTERNS[kind].format(**parts)


def expand_names(lua: str) -> str:
    """The script with each ``status_name(key)``, ``leases_name()`` written out as ``PREFIX .. 'status:' .. key``.

    Written out, not called: a script makes its functions anew at every run, and forty of them cost more than a hit.
    So are ``record_fields()``, a list of names, and ``record_values(values)``, what belongs to them in a table.
    """
    lua = lua.replace("record_fields()", ", ".join(map(repr, RECORD_FIELDS)))
    lua = _VALUES.sub(lambda match: _values(match[1]), lua)
    return _NAME.sub(_expression, lua)


def _values(name: str) -> str:
    return ", ".join(f"{field} = {name}[{place}]" for place, field in enumerate(RECORD_FIELDS, 1))


_VALUES = re.compile(r"\brecord_values\((\w+)\)")


_NAME = re.compile(r"\b(" + "|".join(PATTERNS) + r")_name\(((?:[^()]|\[[^]]*\])*)\)")


def _expression(match: re.Match[str]) -> str:
    arguments = [argument.strip() for argument in match[2].split(",") if argument.strip()]
    literals = re.split(r"\{\w+\}", PATTERNS[match[1]])
    if len(arguments) != len(literals) - 1:
        raise ValueError(f"{match[0]} has {len(arguments)} arguments, the name takes {len(literals) - 1}")
    pieces = ["PREFIX", repr(literals[0])]
    for argument, literal in zip(arguments, literals[1:], strict=True):
        pieces += [argument, repr(literal)] if literal else [argument]
    return f"({' .. '.join(pieces)})"


#: what stands before every script
LUA_CONSTANTS = "local PREFIX = ARGV[1]\nlocal RECORD_FIELDS = {" + ", ".join(map(repr, RECORD_FIELDS)) + "}\n"

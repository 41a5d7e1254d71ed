"""A database that is opened once per process, and an archive that is looked at before anything is computed.

rqarm worker --handlers examples/resources.py
rqarm submit --wait '/sales/2024'        # from the archive: the log says `by lookup`
rqarm submit --wait '/sales/2025'        # computed
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import rqarm
from rqarm import BatchRequest, Context, Handlers

ROWS = [(2024, "March", 10), (2024, "April", 12), (2025, "March", 17), (2025, "May", 25)]
#: the years that are closed; their reports do not change any more
ARCHIVE = {2024: {"year": 2024, "total": 22, "source": "archive"}}

handlers = Handlers()


@handlers.resource("db")
def open_database() -> Iterator[sqlite3.Connection]:
    """Before the ``yield`` once per process, behind it at its end."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute("CREATE TABLE sales (year, month, amount)")
    connection.executemany("INSERT INTO sales VALUES (?, ?, ?)", ROWS)
    yield connection
    connection.close()


@handlers.route("/sales/{year:int}")
def sales(request: BatchRequest, context: Context, year: int) -> dict[str, object]:
    """The sum of a year, from the database."""
    (total,) = context.resources.db.execute("SELECT sum(amount) FROM sales WHERE year = ?", (year,)).fetchone()
    return {"year": year, "total": total or 0, "source": "database"}


@sales.lookup
def archived(request: BatchRequest, context: Context, year: int) -> object:
    """Asked first. MISS: the handler is called."""
    return ARCHIVE.get(year, rqarm.MISS)

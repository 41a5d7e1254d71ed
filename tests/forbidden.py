"""What a hostile client would like a worker to run. Being imported leaves a note, and so does each function."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def _note(name: str) -> None:
    if place := os.environ.get("NOTES"):
        (Path(place) / name).touch()


_note("imported")


def harm(*_: Any) -> str:
    _note("harmed")
    return "done"


class Pickled:
    """Harms whoever unpickles it."""

    def __reduce__(self) -> Any:
        return harm, ()

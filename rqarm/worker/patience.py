"""How long to wait before a server that refused is asked again, or before what died is started again."""

from __future__ import annotations

import random
from collections.abc import Callable


def pause_after(
    failures: int, *, first: float = 0.2, longest: float = 5.0, chance: Callable[[], float] = random.random
) -> float:
    """Seconds after so many failures in a row, 1 or more: doubled at each, and of that between half and all."""
    return min(longest, first * 2.0 ** min(failures - 1, 30)) * (0.5 + chance() / 2)

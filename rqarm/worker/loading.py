"""Find handlers by name: ``module:attribute`` or ``path/to/file.py:attribute``.

The names come from the operator (command line, RQARM_HANDLERS), never from data in Redis.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from rqarm.errors import ConfigError
from rqarm.handlers import Handlers

VARIABLE = "RQARM_HANDLERS"
#: what ``module`` alone means
DEFAULT_ATTRIBUTE = "handlers"


def load_handlers(specs: Iterable[str] = ()) -> Handlers:
    """All handlers of the specs, in their order, then those of installed plugins (entry points ``rqarm.handlers``).

    Without specs those of RQARM_HANDLERS, separated by commas. Raises ConfigError naming the spec.
    """
    chosen = [spec for spec in specs if spec] or [part for part in os.environ.get(VARIABLE, "").split(",") if part]
    handlers = Handlers()
    for spec in chosen:
        handlers.include(_load(spec.strip()))
    handlers.load_plugins()
    return handlers


def _load(spec: str) -> Handlers:
    where, _, attribute = spec.rpartition(":") if ":" in spec else (spec, "", DEFAULT_ATTRIBUTE)
    try:
        module = _file(Path(where)) if where.endswith(".py") else _module(where)
    except Exception as error:  # a module may raise anything when it is imported
        what = error if isinstance(error, ImportError | OSError | SyntaxError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"handlers {spec!r}: cannot import {where!r}: {what}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Handlers):
        raise ConfigError(f"handlers {spec!r}: {where!r} has no Handlers named {attribute!r}, but {found!r}")
    return found


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `rq worker` and `flask` do: people work beside their module
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

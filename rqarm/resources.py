"""What handlers share in a process: connections, models; built on first use, torn down at its end."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rqarm.errors import ConfigError, RqarmError
from rqarm.text import name_of

#: what a factory that yields no more has given
_NOTHING: Any = object()


class ResourceError(RqarmError):
    """A resource could not be set up or torn down. The message names it, ``__cause__`` is the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"resource {name!r}: {reason}")
        self.name, self.reason = name, reason


class _Built:
    """What one process has built, oldest first: name -> (value, what tears it down)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.values: dict[str, Any] = {}
        self.running: dict[str, Any] = {}

    def forget(self, name: str) -> None:
        self.values.pop(name, None)
        self.running.pop(name, None)


class Resources:
    """The resources of handlers: ``resources.db`` and ``resources["db"]`` build on first use, once per process.

    A fork starts with nothing built and leaves what the parent built alone. Builds of different threads wait for each
    other.
    """

    def __init__(self) -> None:
        self.factories: dict[str, Callable[[], Any]] = {}
        # by process: the child of a fork must neither use nor finalise what the parent built
        self._by_process: dict[int, _Built] = {}

    def add(self, name: str, factory: Callable[[], Any]) -> None:
        """Raises ConfigError for a name that is taken or cannot be an attribute."""
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise ConfigError(f"resource {name!r}: the name must be an identifier that does not start with _")
        if hasattr(type(self), name) or name == "factories":
            raise ConfigError(f"resource {name!r}: the name is taken by Resources itself")
        if name in self.factories:
            raise ConfigError(
                f"resource {name!r} is registered twice: {name_of(factory)}, {name_of(self.factories[name])}"
            )
        self.factories[name] = factory

    def __iter__(self) -> Iterator[str]:
        return iter(self.factories)

    def __contains__(self, name: object) -> bool:
        return name in self.factories

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.factories:
            raise AttributeError(f"no resource {name!r} is registered; there are: {', '.join(self) or 'none'}")
        return self[name]

    def __getitem__(self, name: str) -> Any:
        """The resource, built when this process has not built it yet.

        Raises KeyError when there is none of this name, ResourceError when it cannot be built or is an async one
        that ``start`` has not built yet.
        """
        built = self._built()
        if name in built.values:
            return built.values[name]
        if name not in self.factories:
            raise KeyError(f"no resource {name!r} is registered; there are: {', '.join(self) or 'none'}")
        with built.lock:
            if name not in built.values:
                self._build(name, built)
            return built.values[name]

    @property
    def are_built(self) -> bool:
        """Whether this process has built any."""
        return bool(self._built().values)

    def close(self) -> None:
        """Tear down what this process has built, newest first; a later use builds anew.

        All tear-downs run. Raises ResourceError for the first that failed, with notes on the others.
        """
        built = self._built()
        failed: list[ResourceError] = []
        with built.lock:
            for name in reversed(list(built.values)):
                running = built.running.get(name)
                if inspect.isasyncgen(running):
                    failed.append(ResourceError(name, "it is async: aclose() tears it down"))
                    continue
                built.forget(name)
                try:
                    _check_end(name, next(running, _NOTHING) if running else _NOTHING)
                except Exception as error:  # noqa: BLE001 - raised below, when the others are torn down too
                    failed.append(_teardown_error(name, error))
        _raise_first(failed)

    async def start(self) -> None:
        """Build all async resources. Await it in one task, before the first async handler runs.

        Raises ResourceError naming the one that cannot be built.
        """
        built = self._built()
        for name, factory in self.factories.items():
            if not _is_async(factory) or name in built.values:
                continue
            try:
                if inspect.isasyncgenfunction(factory):
                    running = factory()
                    value = await anext(running, _NOTHING)
                    if value is _NOTHING:
                        raise ResourceError(name, "it yields nothing")
                    built.running[name] = running
                else:
                    value = await factory()
            except ResourceError:
                raise
            except Exception as error:
                raise ResourceError(name, f"set-up failed with {type(error).__name__}: {error}") from error
            built.values[name] = value

    async def aclose(self) -> None:
        """As ``close``, for async resources too. Await it in the loop that ran ``start``."""
        built = self._built()
        failed: list[ResourceError] = []
        for name in reversed(list(built.values)):
            running = built.running.get(name)
            built.forget(name)
            try:
                if inspect.isasyncgen(running):
                    _check_end(name, await anext(running, _NOTHING))
                else:
                    _check_end(name, next(running, _NOTHING) if running else _NOTHING)
            except Exception as error:  # noqa: BLE001 - raised below, when the others are torn down too
                failed.append(_teardown_error(name, error))
        _raise_first(failed)

    def _built(self) -> _Built:
        pid = os.getpid()
        return self._by_process.get(pid) or self._by_process.setdefault(pid, _Built())

    def _build(self, name: str, built: _Built) -> None:
        factory = self.factories[name]
        if _is_async(factory):
            raise ResourceError(name, "it is async: it is there for async handlers only, after start()")
        try:
            if inspect.isgeneratorfunction(factory):
                running = factory()
                value = next(running, _NOTHING)
                if value is _NOTHING:
                    raise ResourceError(name, "it yields nothing")
                built.running[name] = running
            else:
                value = factory()
        except ResourceError:
            raise
        except Exception as error:
            raise ResourceError(name, f"set-up failed with {type(error).__name__}: {error}") from error
        built.values[name] = value


def _is_async(factory: Callable[[], Any]) -> bool:
    return inspect.iscoroutinefunction(factory) or inspect.isasyncgenfunction(factory)


def _check_end(name: str, again: Any) -> None:
    if again is not _NOTHING:
        raise ResourceError(name, "it yields more than once")


def _teardown_error(name: str, error: Exception) -> ResourceError:
    if isinstance(error, ResourceError):
        return error
    failure = ResourceError(name, f"tear-down failed with {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _raise_first(failed: list[ResourceError]) -> None:
    if not failed:
        return
    for other in failed[1:]:
        failed[0].add_note(str(other))
    raise failed[0]

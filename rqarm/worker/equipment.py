"""What a process that runs requests works with, as long as it lives: handlers, managers, an event loop, resources."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import redis

from rqarm import tracing
from rqarm.handlers import Handlers
from rqarm.manager import RequestManager
from rqarm.worker.loading import load_handlers

log = logging.getLogger("rqarm.worker")


@dataclass(slots=True)
class Equipment:
    """What lives as long as the process: the handlers, a manager for each connection, an event loop."""

    pid: int = field(default_factory=os.getpid)
    handlers: Handlers | None = None
    managers: dict[tuple[str, int], RequestManager] = field(default_factory=dict)
    runner: asyncio.Runner | None = None
    has_async_resources: bool = False
    closes_at_exit: bool = False
    #: two must not build them at the same time
    building: asyncio.Lock | None = None


_equipment = Equipment()


def use_handlers(handlers: Handlers) -> None:
    """The handlers of this process and of the horses that it forks, instead of those of RQARM_HANDLERS."""
    of_this_process().handlers = handlers


def of_this_process() -> Equipment:
    global _equipment
    if _equipment.pid != os.getpid():
        # a fork: handlers and managers are inherited (clients open connections of their own), event loops are not
        _equipment = Equipment(handlers=_equipment.handlers, managers=_equipment.managers)
    return _equipment


@contextmanager
def serving(handlers: Handlers) -> Iterator[None]:
    """Run requests with these handlers until the block ends; then their resources and their loop are gone."""
    global _equipment
    before, _equipment = of_this_process(), Equipment(handlers=handlers)
    try:
        yield
    finally:
        close_resources()
        if _equipment.runner is not None:
            _equipment.runner.close()
        _equipment = before


def handlers() -> Handlers:
    """The handlers of this process, loaded at the first call. Raises ConfigError."""
    ours = of_this_process()
    if ours.handlers is None:
        ours.handlers = load_handlers()
    return ours.handlers


def event_loop() -> asyncio.Runner:
    """The event loop of this process."""
    ours = of_this_process()
    if ours.runner is None:
        ours.runner = asyncio.Runner()
    return ours.runner


async def start_resources() -> None:
    """Build the async resources of this process, on its event loop, once. Raises ResourceError."""
    ours = of_this_process()
    if ours.has_async_resources:
        return
    if ours.building is None:
        ours.building = asyncio.Lock()
    async with ours.building:
        if not ours.has_async_resources:
            await handlers().resources.start()
            ours.has_async_resources = True


def close_resources() -> None:
    """Tear down what handlers built in this process: its last job is done. What fails is logged."""
    ours = of_this_process()
    if ours.handlers is None:
        return
    try:
        # on the loop also when only some of them could be built
        if ours.runner is not None and ours.building is not None:
            ours.runner.run(ours.handlers.resources.aclose())
        else:
            ours.handlers.resources.close()
    except Exception:
        log.exception("a resource was not torn down")
    ours.has_async_resources = False
    try:
        tracing.flush()
    except Exception:
        log.exception("the last spans were not exported")


def manager_for(namespace: str, connection: redis.Redis) -> RequestManager:
    """The manager of a namespace on RQ's own connection."""
    managers = of_this_process().managers
    manager = managers.get((namespace, id(connection)))
    if manager is None:
        manager = managers[namespace, id(connection)] = RequestManager(connection=connection, namespace=namespace)
    return manager

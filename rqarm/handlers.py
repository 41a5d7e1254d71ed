"""Which function executes a request, with which arguments.

Routes are tried in the order of their registration and the first match wins. What the template leaves open is filled
from the query by the names of the function's parameters. Nothing here runs a handler or talks to Redis: the worker
calls ``Match.call`` and obeys ``Route`` and ``Retry``.
"""

from __future__ import annotations

import difflib
import enum
import functools
import importlib.metadata
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, ParamSpec, TypeVar, Unpack, overload

from rqarm import mounts
from rqarm.context import Context
from rqarm.errors import ConfigError, InvalidRequest, NoHandler
from rqarm.model import OWN_OPERATION, FollowUp, Key
from rqarm.parameters import Parameter, parameters_of, signature_of
from rqarm.request import BatchRequest
from rqarm.resources import Resources
from rqarm.routes import Options, Retry, Route
from rqarm.templates import PLACEHOLDER, Target, Template, split_template
from rqarm.text import name_of

P = ParamSpec("P")
R = TypeVar("R")
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class _Miss(enum.Enum):
    MISS = "MISS"

    def __repr__(self) -> str:
        return "rqarm.MISS"


#: what a look-up returns that has no value: then the handler is called
MISS: Final = _Miss.MISS


class Handler(Generic[P, R]):
    """A function with its route. Calling it calls the function, as a unit test wants it."""

    __name__: str

    def __init__(self, function: Callable[P, R], route: Route, template: Template | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.route = route
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._template = template
        self._parameters = parameters_of(function, template.converters if template else {})
        self.finder: Callable[..., Any] | None = None
        self.hooks: dict[FollowUp, Hook] = {}

    @overload
    def callback(self, function: AnyFunction, /) -> AnyFunction: ...
    @overload
    def callback(
        self, /, *, retry: Retry | None = ..., timeout: float | None = ...
    ) -> Callable[[AnyFunction], AnyFunction]: ...
    def callback(self, function: Any = None, /, **options: Any) -> Any:
        """Let the decorated function be called once per completion, with the result and the payloads.

        ``@route.callback`` or ``@route.callback(retry=..., timeout=...)``. It runs as an RQ job of its own, at least
        once, and again as ``retry`` says when it raises; the result does not depend on it. ``payloads`` is the list of
        what was submitted with ``payload=``, in no order. A parameter ``context`` gets the context. It may be ``async
        def``. Raises ConfigError when the signature cannot be filled or there is one already.
        """
        return self._hook(FollowUp.CALLBACK, function, options)

    @overload
    def on_failure(self, function: AnyFunction, /) -> AnyFunction: ...
    @overload
    def on_failure(
        self, /, *, retry: Retry | None = ..., timeout: float | None = ...
    ) -> Callable[[AnyFunction], AnyFunction]: ...
    def on_failure(self, function: Any = None, /, **options: Any) -> Any:
        """Let the decorated function be called once per final failure, with the error and the payloads.

        As ``callback``. ``error`` is a dict of ``type``, ``message`` and ``traceback``, all text.
        """
        return self._hook(FollowUp.FAILURE, function, options)

    def _hook(self, kind: FollowUp, function: Any, options: dict[str, Any]) -> Any:
        def register(function: AnyFunction) -> AnyFunction:
            if kind in self.hooks:
                raise ConfigError(
                    f"{name_of(function)}: {self.route.name} has {name_of(self.hooks[kind].function)} for that"
                )
            self.hooks[kind] = Hook(kind, function, self.route, **options)
            return function

        return register if function is None else register(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Handler {self.route.name!r}: {name_of(self.function)}>"

    def lookup(self, function: AnyFunction) -> AnyFunction:
        """Let the decorated function look for the value before the handler is called: ``@cities.lookup``.

        It gets the arguments of the handler. What it returns completes the request; ``rqarm.MISS`` = it has none, call
        the handler. It may be async; an error in it is one of the handler, and its time counts as the handler's.

        Raises ConfigError when there is one already or its signature does not take the arguments.
        """
        if self.finder is not None:
            raise ConfigError(
                f"{name_of(function)}: {name_of(self.finder)} is the look-up of {self.route.name!r} already"
            )
        try:
            signature_of(function).bind(None, None, **dict.fromkeys(self.parameters))
        except TypeError as error:
            takes = ", ".join(("request", "context", *self.parameters))
            raise ConfigError(f"{name_of(function)}: a look-up must take ({takes}), as its handler: {error}") from error
        self.finder = function
        return function

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of what a request fills."""
        return tuple(each.name for each in self._parameters)

    def request(self, /, *args: Any, **params: Any) -> BatchRequest:
        """The request that this handler takes with these arguments.

        Positional ones fill the template in order, the first one of an operation is its URI; keywords fill template
        or query. None and empty lists leave a parameter out if its default means the same. The route's options go
        with the request.

        Raises InvalidRequest when an argument is unknown, missing, of the wrong type, or cannot stand in a URI.
        """
        where = self.route.name
        uri, args = self._base(args)
        in_path = list(self._template.converters) if self._template else []
        if len(args) > len(in_path):
            raise InvalidRequest(f"takes {len(in_path)} positional arguments, not {len(args)}", where=where)
        given = dict(zip(in_path, args, strict=False))
        if twice := sorted(set(given) & set(params)):
            raise InvalidRequest(f"{', '.join(twice)}: given twice", where=where)
        given |= params
        if unknown := sorted(set(given) - set(self.parameters)):
            known = ", ".join(self.parameters) or "none"
            raise InvalidRequest(f"no such parameter: {', '.join(unknown)}; there are: {known}", where=where)
        texts = self._texts(given)
        query = {name: each for name, each in texts.items() if name not in in_path}
        if self._template:
            if lost := [name for name in in_path if not texts.get(name)]:
                raise InvalidRequest(f"{', '.join(lost)}: missing in the path", where=where)
            uri = self._template.build({name: texts[name][0] for name in in_path})
        request = BatchRequest(uri, query, **self.route.for_request())
        self._check_survival(request, texts)
        return request

    def bind(self, request: BatchRequest) -> dict[str, Any] | None:
        """The arguments for this request, None when it is not one of ours.

        Raises InvalidRequest that names the parameter which is missing or cannot be converted.
        """
        return self._bind(request, Target.of(request.canonical))

    def _bind(self, request: BatchRequest, target: Target) -> dict[str, Any] | None:
        texts = self._take(request, target)
        return None if texts is None else self._arguments(texts)

    def _take(self, request: BatchRequest, target: Target) -> dict[str, list[str]] | None:
        """The texts from query and path. An operation goes by its name alone, a route takes no operations."""
        if self._template:
            found = None if request.operation else self._template.match(target)
            return None if found is None else request.query | {name: [text] for name, text in found.items()}
        return request.query if self.route.operation in ("", request.operation) else None

    def _arguments(self, texts: Mapping[str, list[str]]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for parameter in self._parameters:
            if parameter.name in texts:
                try:
                    arguments[parameter.name] = parameter.read(texts[parameter.name])
                except ValueError as error:
                    raise InvalidRequest(str(error), where=self._place_of(parameter)) from None
            elif parameter.is_required:
                raise InvalidRequest("is missing and has no default", where=self._place_of(parameter))
        return arguments

    def _place_of(self, parameter: Parameter) -> str:
        return f"parameter {parameter.name!r} of {self.route.name}"

    def _base(self, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        if self._template:
            return "", args
        if args and not isinstance(args[0], str):
            raise InvalidRequest(f"the URI must be a str, not {args[0]!r}", where=self.route.name)
        return (args[0], args[1:]) if args else ("", args)

    def _texts(self, given: Mapping[str, Any]) -> dict[str, list[str]]:
        texts: dict[str, list[str]] = {}
        for parameter in self._parameters:
            if parameter.name in given:
                try:
                    texts[parameter.name] = parameter.write(given[parameter.name])
                except (ValueError, TypeError) as error:
                    raise InvalidRequest(str(error), where=self._place_of(parameter)) from None
        return {name: each for name, each in texts.items() if each}

    def _check_survival(self, request: BatchRequest, texts: Mapping[str, list[str]]) -> None:
        """Refuse what the canonical form changes: ``..`` as a segment, ``x-y`` where the template says ``{a}-{b}``."""
        found = self._take(request, Target.of(request.canonical)) or {}
        if lost := [name for name, each in texts.items() if found.get(name) != each]:
            shown = ", ".join(f"{name}={texts[name] if len(texts[name]) > 1 else texts[name][0]!r}" for name in lost)
            raise InvalidRequest(f"{shown} cannot stand in the URI as it is", where=self.route.name)
        self._arguments(found)


#: retries of a follow-up whose function raises, unless it says otherwise
HOOK_RETRY = Retry(max=3, interval=(1.0, 10.0, 60.0), jitter=0.1)
#: how many values each kind of follow-up is called with
_GIVEN = {FollowUp.CALLBACK: 2, FollowUp.FAILURE: 2, FollowUp.QUARANTINE: 1}


class Hook(Handler[..., Any]):
    """A function that is called when a request has ended, with a route that says how: for how long, how often again."""

    def __init__(
        self,
        kind: FollowUp,
        function: Callable[..., Any],
        of: Route,
        *,
        retry: Retry | None = HOOK_RETRY,
        timeout: float | None = None,
    ) -> None:
        try:
            self.takes_context = _check_hook(function, _GIVEN[kind])
            route = Route(
                name=f"{kind} of {of.name}",
                operation=f"{OWN_OPERATION}{kind}",
                retry=retry,
                timeout=timeout,
                failure_ttl=of.failure_ttl,
                thread_safe=of.thread_safe,
            )
        except ConfigError as error:
            raise ConfigError(f"{name_of(function)}: {error}") from error
        functools.update_wrapper(self, function)
        self.kind, self.function, self.route = kind, function, route
        self.is_async = inspect.iscoroutinefunction(function)
        self.hooks = {}
        self._template, self._parameters = None, ()


def _check_hook(function: Callable[..., Any], given: int) -> bool:
    """Whether the function of a follow-up takes a context beside what it is given. Raises ConfigError."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError("it is a generator, of which nothing would ever run: nobody reads what it yields")
    parameters = signature_of(function).parameters
    takes_context = "context" in list(parameters)[given:]
    try:
        signature_of(function).bind(*range(given), **({"context": None} if takes_context else {}))
    except TypeError as error:
        wanted = {1: "the entry", 2: "the result or error and the payloads"}[given]
        raise ConfigError(f"it is called with {wanted}, and `context` if it has that parameter: {error}") from error
    return takes_context


@dataclass(frozen=True, slots=True)
class Match:
    """The handler that takes a request, and its arguments."""

    handler: Handler[..., Any]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def route(self) -> Route:
        return self.handler.route

    def call(self, request: BatchRequest, context: Context, *, has_looked: bool = False) -> Any:
        """Call the handler, behind its look-up if it has one: its value, or a coroutine when one of the two is async.

        When the coroutine of a handler that is not async gives MISS, that was the look-up's: call it ``has_looked``.
        Arguments that an earlier attempt changed (``context.kwargs``) win over those of the request.
        """
        changed = {name: context.kwargs[name] for name in self.handler.parameters if name in context.kwargs}
        kwargs = self.kwargs | changed
        if self.handler.finder is None or has_looked:
            return self.handler.function(request, context, **kwargs)
        found = self.handler.finder(request, context, **kwargs)
        if self.handler.is_async or inspect.isawaitable(found):
            return self._found_later(found, request, context, kwargs)
        context.is_found = found is not MISS
        return found if context.is_found else self.handler.function(request, context, **kwargs)

    async def _found_later(self, found: Any, request: BatchRequest, context: Context, kwargs: dict[str, Any]) -> Any:
        if inspect.isawaitable(found):
            found = await found
        context.is_found = found is not MISS
        if context.is_found or not self.handler.is_async:
            return found
        return await self.handler.function(request, context, **kwargs)


@dataclass(frozen=True, slots=True)
class FollowUpMatch(Match):
    """The function of a follow-up, and what it is given once that has been fetched.

    ``about``: the request that has ended; ``of``: its key.
    """

    kind: FollowUp = FollowUp.CALLBACK
    about: BatchRequest | None = None
    of: Key | None = None
    arguments: tuple[Any, ...] = ()

    def given(self, of: Key, *arguments: Any) -> FollowUpMatch:
        return replace(self, of=of, arguments=arguments)

    def call(self, request: BatchRequest, context: Context, *, has_looked: bool = False) -> Any:
        assert isinstance(self.handler, Hook)
        if not self.handler.takes_context:
            return self.handler.function(*self.arguments)
        context.request, context.key = self.about or request, self.of or context.key
        return self.handler.function(*self.arguments, context=context)


class Handlers:
    """The routes, operations and resources of a worker. Register all of them at import time, then only match."""

    def __init__(self) -> None:
        self.resources = Resources()
        self._handlers: list[Handler[..., Any]] = []
        self._fallback: Handler[..., Any] | None = None
        self._consumer: Hook | None = None

    def __iter__(self) -> Iterator[Handler[..., Any]]:
        """All handlers in the order in which they are tried, the fallback last."""
        yield from self._handlers
        if self._fallback:
            yield self._fallback

    @property
    def routes(self) -> tuple[Route, ...]:
        """All routes in the order in which they are tried, the fallback last."""
        return tuple(handler.route for handler in self)

    def route(self, template: str, **options: Unpack[Options]) -> Callable[[Callable[P, R]], Handler[P, R]]:
        """Let the decorated function execute requests whose URI matches ``template``.

        ``{name}`` takes one path segment, ``{name:int}`` and ``{name:float}`` a number, ``{name:path}`` several
        segments. A template that starts with ``/`` takes any scheme and host. The function is called with the
        request, the context, and its other parameters by name.

        Raises ConfigError naming the function when template, options or signature cannot work.
        """
        return lambda function: self._add(function, options, lambda: Template.compile(template))

    def operation(self, name: str, /, **options: Unpack[Options]) -> Callable[[Callable[P, R]], Handler[P, R]]:
        """Let the decorated function execute requests with this operation name, whatever their URI.

        The query fills its parameters as it does for ``route``. Raises ConfigError naming the function.
        """
        return lambda function: self._add(function, options, None, name)

    def fallback(self, function: Callable[P, R]) -> Handler[P, R]:
        """Let the decorated function execute what nothing else takes. Raises ConfigError when there is one already."""
        function = _bare(function)
        if self._fallback:
            raise ConfigError(f"{name_of(function)}: {name_of(self._fallback.function)} is the fallback already")
        try:
            handler = Handler(function, Route(name="fallback"))
        except ConfigError as error:
            raise ConfigError(f"{name_of(function)}: {error}") from error
        self._fallback = handler
        return handler

    @overload
    def quarantine(self, function: AnyFunction, /) -> AnyFunction: ...
    @overload
    def quarantine(
        self, /, *, retry: Retry | None = ..., timeout: float | None = ...
    ) -> Callable[[AnyFunction], AnyFunction]: ...
    def quarantine(self, function: Any = None, /, **options: Any) -> Any:
        """Let the decorated function be called once for each request that is set aside, with its QuarantineEntry.

        As ``Handler.callback``. Raises ConfigError when there is one already.
        """

        def register(function: AnyFunction) -> AnyFunction:
            if self._consumer:
                raise ConfigError(
                    f"{name_of(function)}: {name_of(self._consumer.function)} is for the quarantine already"
                )
            self._consumer = Hook(FollowUp.QUARANTINE, function, Route(name="all"), **options)
            return function

        return register if function is None else register(function)

    def follows(self, kind: FollowUp) -> bool:
        """Whether anything is to be done about requests that end in this way."""
        if kind is FollowUp.QUARANTINE:
            return self._consumer is not None
        return any(kind in handler.hooks for handler in self)

    def handler_of(self, request: BatchRequest) -> Handler[..., Any] | None:
        """The first handler that takes the request, whatever its arguments are; None when none does."""
        target = Target.of(request.canonical)
        return next((handler for handler in self if handler._take(request, target) is not None), None)

    def _follow_up(self, request: BatchRequest) -> FollowUpMatch:
        word, _, operation = request.operation.removeprefix(OWN_OPERATION).partition(":")
        if word not in list(FollowUp):
            raise NoHandler(f"{request.operation!r} is none of rqarm's own operations: upgrade, or correct the request")
        kind, hook = FollowUp(word), self._consumer
        about = BatchRequest(request.uri, request.params, operation=operation)
        if kind is not FollowUp.QUARANTINE:
            handler = self.handler_of(about)
            hook = handler.hooks.get(kind) if handler is not None else None
        if hook is None:
            raise NoHandler(f"no {kind} function here is for {about!r}: a worker with other handlers made its request")
        return FollowUpMatch(hook, kind=kind, about=about)

    def resource(self, name: str) -> Callable[[AnyFunction], AnyFunction]:
        """Let the decorated function build ``context.resources.<name>``, once per process, on first use.

        It returns the value, or yields it and tears down what follows the ``yield``. The async forms of both are
        built by the worker before its first async handler. Raises ConfigError for a bad or repeated name.
        """

        def register(factory: AnyFunction) -> AnyFunction:
            self.resources.add(name, factory)
            return factory

        return register

    def match(self, request: BatchRequest) -> Match:
        """The first handler that takes the request, with its arguments.

        Raises NoHandler naming the closest routes when none does, InvalidRequest when the first one that does cannot
        be given its arguments. Neither is worth a retry.
        """
        if request.operation.startswith(OWN_OPERATION):
            return self._follow_up(request)
        target = Target.of(request.canonical)
        for handler in self:
            kwargs = handler._bind(request, target)
            if kwargs is not None:
                return Match(handler, kwargs)
        raise NoHandler(self._reason(request.operation, target))

    def include(self, other: Handlers) -> None:
        """Append the routes and resources of ``other`` as they are now; what stands here already wins.

        Raises ConfigError when a resource, a fallback, a consumer of the quarantine, or a name for a different route
        exists twice; nothing is added then.
        """
        if other is self:
            raise ConfigError("Handlers cannot include themselves")
        if twice := sorted(set(self.resources) & set(other.resources)):
            raise ConfigError(f"resource {', '.join(twice)} is registered on both sides")
        if self._fallback and other._fallback:
            raise ConfigError(
                f"{name_of(other._fallback.function)}: {name_of(self._fallback.function)} is the fallback already"
            )
        if self._consumer and other._consumer:
            theirs, ours = name_of(other._consumer.function), name_of(self._consumer.function)
            raise ConfigError(f"{theirs}: {ours} is for the quarantine already")
        for handler in other._handlers:
            self._check_name(handler, same_pattern=True)
        for name, factory in other.resources.factories.items():
            self.resources.add(name, factory)
        self._handlers += other._handlers
        self._fallback = self._fallback or other._fallback
        self._consumer = self._consumer or other._consumer

    def load_plugins(self, group: str = "rqarm.handlers") -> list[str]:
        """Include the handlers of installed packages and return the names of their entry points, in order of name.

        An entry point is a Handlers to include or a callable that takes this one. Raises ConfigError naming the
        plugin that cannot be loaded.
        """
        found = sorted(importlib.metadata.entry_points(group=group), key=lambda each: (each.name, each.value))
        for entry in found:
            try:
                plugin = entry.load()
                if isinstance(plugin, Handlers):
                    self.include(plugin)
                elif callable(plugin):
                    plugin(self)
                else:
                    raise ConfigError(f"it is a {type(plugin).__name__}, neither Handlers nor a callable")
            except Exception as error:
                raise ConfigError(f"plugin {entry.name!r} ({entry.value}): {error}") from error
        return [entry.name for entry in found]

    def mount_wsgi(self, app: Callable[..., Iterable[bytes]], prefix: str = "", **options: Unpack[Options]) -> None:
        """Let a WSGI app execute the requests under ``prefix``, as a GET of the canonical URI.

        The app sees the prefix as SCRIPT_NAME and the Context as ``environ["rqarm.context"]``. A 2xx answer is the
        result; a redirect or 4xx raises AppRefusal, anything else AppError. Raises ConfigError for a bad prefix.
        """
        template = mounts.template_under(prefix, app)
        self._add(mounts.wsgi_handler(app, template), options, lambda: template)

    def mount_asgi(self, app: Callable[..., Awaitable[None]], prefix: str = "", **options: Unpack[Options]) -> None:
        """Let an ASGI app execute the requests under ``prefix``, as a GET of the canonical URI.

        The app sees the prefix as root_path and the Context as ``scope["rqarm.context"]``; it gets no lifespan
        events. A 2xx answer is the result; a redirect or 4xx raises AppRefusal, anything else AppError. Raises
        ConfigError for a bad prefix.
        """
        template = mounts.template_under(prefix, app)
        self._add(mounts.asgi_handler(app, template), options, lambda: template)

    def _add(
        self,
        function: Callable[P, R],
        options: Options,
        template: Callable[[], Template] | None,
        operation: str = "",
    ) -> Handler[P, R]:
        function = _bare(function)
        try:
            if unknown := sorted(set(options) - set(Options.__annotations__)):
                raise ConfigError(
                    f"no such option: {', '.join(unknown)}; there are {', '.join(Options.__annotations__)}"
                )
            compiled = template() if template else None
            if not compiled and not operation:
                raise ConfigError("an operation needs a name")
            if operation.startswith(OWN_OPERATION):
                raise ConfigError(f"names of operations that begin with {OWN_OPERATION} are for rqarm's own")
            text = compiled.text if compiled else ""
            given: dict[str, Any] = {name: value for name, value in options.items() if name != "name"}
            name = options.get("name")
            route = Route(
                name=(text or operation) if name is None else name, template=text, operation=operation, **given
            )
            handler = Handler(function, route, compiled)
            self._check_name(handler)
        except ConfigError as error:
            raise ConfigError(f"{name_of(function)}: {error}") from error
        self._handlers.append(handler)
        return handler

    def _check_name(self, handler: Handler[..., Any], *, same_pattern: bool = False) -> None:
        new = handler.route
        for other in self._handlers:
            old = other.route
            if (old.template, old.operation) == (new.template, new.operation):
                if not same_pattern:
                    raise ConfigError(f"{new.template or new.operation!r} is taken by {name_of(other.function)}")
            elif old.name == new.name:
                raise ConfigError(f"the name {new.name!r} is taken by {name_of(other.function)}")

    def _reason(self, operation: str, target: Target) -> str:
        # without the query: its values may be secret
        if operation:
            asked, kind = repr(operation), "operation"
            known = {route.operation: route.operation for route in self.routes if route.operation}
            close = difflib.get_close_matches(operation, known, n=3, cutoff=0.5)
        else:
            asked, kind = repr(target.path), "route"
            texts = [route.template for route in self.routes if route.template]
            known = {PLACEHOLDER.sub("", split_template(text)[1]): text for text in texts}
            close = difflib.get_close_matches(target.path, known, n=3, cutoff=0.4)
        closest = ", ".join(known[each] for each in close)
        hint = f"closest: {closest}" if closest else f"none of {len(known)} is like it" if known else "there is none"
        return f"no {kind} takes {asked} ({hint}): register a handler or correct the request"


def _bare(function: Callable[P, R]) -> Callable[P, R]:
    """The function below earlier decorators of ours, so that one function can have several routes."""
    return function.function if isinstance(function, Handler) else function

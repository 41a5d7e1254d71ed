"""Which function executes a request, with which arguments.

Routes are tried in the order of their registration and the first match wins. A URI template is matched against the
path of the canonical URI, percent-decoded segment by segment, so that ``%2F`` never splits one. What the template
leaves open is filled from the query by the names of the function's parameters. Nothing here runs a handler or talks
to Redis: the worker calls ``Match.call`` and obeys ``Route`` and ``Retry``.
"""

from __future__ import annotations

import difflib
import enum
import functools
import importlib.metadata
import inspect
import io
import itertools
import math
import os
import re
import sys
import threading
import types
import typing
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from email.message import Message
from typing import Any, Final, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote, unquote, unquote_to_bytes

from rqarm.context import Context
from rqarm.errors import ConfigError, InvalidRequest, NoHandler, ResultTooLarge, RqarmError, UnpackableResult
from rqarm.model import OWN_OPERATION, FollowUp, Key, Priority
from rqarm.request import BatchRequest
from rqarm.result import Result

P = ParamSpec("P")
R = TypeVar("R")
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

#: what may stand in a path segment besides letters, digits and ``-._~`` (RFC 3986, section 3.3, pchar)
_PCHAR = "!$&'()*+,;=:@"
#: RFC 3986, appendix B, without the fragment
_URI = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?(.*))?", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_INT = r"[+-]?[0-9]+"
_FLOAT = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
#: converter of a placeholder -> (what it matches, the type it gives)
_CONVERTERS: dict[str, tuple[str, type]] = {
    "": (r"[^/]+", str),
    "int": (_INT, int),
    "float": (_FLOAT, float),
    "path": (r".+", str),
}
_BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_MISSING: Any = inspect.Parameter.empty
#: how much of a mounted app's error page is kept
_ERROR_BYTES = 1024
#: a mounted WSGI app's answer up to this size is one bytes object, a larger one is streamed
_AHEAD_BYTES = 1_048_576


class AppError(RqarmError):
    """A mounted app answered with a server error. Look at ``status`` and ``body`` (its first 1 KiB), mend the app."""

    def __init__(self, status: int, target: str, body: str = "") -> None:
        super().__init__(f"the mounted app answered {status} to {target}: {body}".rstrip(": "))
        self.status, self.target, self.body = status, target, body


class AppRefusal(AppError):
    """A mounted app answered with a redirect or a client error. Correct the request: it is not tried again."""


class ResourceError(RqarmError):
    """A resource could not be set up or torn down. The message names it, ``__cause__`` is the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"resource {name!r}: {reason}")
        self.name, self.reason = name, reason


class _Miss(enum.Enum):
    MISS = "MISS"

    def __repr__(self) -> str:
        return "rqarm.MISS"


#: what a look-up returns that has no value: then the handler is called
MISS: Final = _Miss.MISS

#: a second try of these ends like the first
_HOPELESS = (InvalidRequest, NoHandler, AppRefusal, UnpackableResult, ResultTooLarge)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when a failed attempt is tried again.

    ``max``: retries after the first attempt. ``interval``: seconds before each; of a sequence the last one repeats.
    ``jitter``: the share of the interval that is added at random at most, 0.1 = up to 10 %. ``on``: the errors that
    are worth it. Raises ConfigError for values that make no sense.
    """

    max: int
    interval: float | Sequence[float] = 0.0
    jitter: float = 0.0
    on: tuple[type[BaseException], ...] = (Exception,)

    def __post_init__(self) -> None:
        if not isinstance(self.max, int) or isinstance(self.max, bool) or self.max < 0:
            raise ConfigError(f"Retry: max must be a whole number, 0 or more, not {self.max!r}")
        if isinstance(self.interval, Sequence):
            object.__setattr__(self, "interval", tuple(self.interval))
        if not self._intervals:
            raise ConfigError("Retry: interval must not be empty")
        for seconds in self._intervals:
            _check_number("Retry: interval", seconds, at_least=0)
        _check_number("Retry: jitter", self.jitter, at_least=0)
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise ConfigError(f"Retry: on must be exception classes, not {self.on!r}")
        object.__setattr__(self, "on", kinds)

    @property
    def _intervals(self) -> tuple[float, ...]:
        return tuple(self.interval) if isinstance(self.interval, Sequence) else (self.interval,)

    def delay(self, nth_retry: int, random: Callable[[], float]) -> float:
        """Seconds before the ``nth_retry`` (1 = the first). ``random`` gives 0..1, such as ``random.random``."""
        intervals = self._intervals
        seconds = intervals[min(max(nth_retry, 1), len(intervals)) - 1]
        return seconds * (1 + self.jitter * random()) if self.jitter else float(seconds)

    def wants(self, exc: BaseException, retries_so_far: int) -> bool:
        """Whether to try again after ``exc``. Never when the request or its result is at fault."""
        return retries_so_far < self.max and isinstance(exc, self.on) and not isinstance(exc, _HOPELESS)


class Options(TypedDict, total=False):
    """The options of a route: see ``Route``."""

    ttl: float | None
    sticky: bool
    timeout: float | None
    retry: Retry | None
    queue: str | None
    priority: str | Priority | None
    estimated_time: float | None
    failure_ttl: float | None
    negative_ttl: float | Mapping[type[BaseException], float] | None
    quarantine: bool
    thread_safe: bool
    max_running: int | None
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is known of a handler without its function. None = the settings decide.

    ``name`` tells routes apart in statistics; it is the template or operation unless given. Either ``template`` or
    ``operation`` is set; neither is for the fallback. ``ttl``, ``failure_ttl``, ``negative_ttl``: seconds that a
    result, the record of a failure, and a failure as an answer live; ``negative_ttl`` may say it per type of error.
    ``quarantine``: whether a request whose last attempt raises is set aside. ``timeout``: seconds that an attempt may
    take. ``estimated_time``: seconds it usually takes. ``max_running``: how many requests of this route run at the same
    time on all workers; they are counted under ``name``. ``thread_safe``: a handler that is not ``async def`` may run
    beside others in threads (``rqarm worker --concurrency``). Raises ConfigError for values that make no sense.
    """

    name: str
    template: str = ""
    operation: str = ""
    ttl: float | None = None
    sticky: bool = False
    timeout: float | None = None
    retry: Retry | None = None
    queue: str | None = None
    priority: str | Priority | None = None
    estimated_time: float | None = None
    failure_ttl: float | None = None
    negative_ttl: float | Mapping[type[BaseException], float] | None = None
    quarantine: bool = True
    thread_safe: bool = False
    max_running: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name:
            raise ConfigError(f"name must be printable text, not {self.name!r}")
        for option in ("timeout", "failure_ttl"):
            if getattr(self, option) is not None:
                _check_number(option, getattr(self, option), above=0)
        if isinstance(self.negative_ttl, Mapping):
            object.__setattr__(self, "negative_ttl", types.MappingProxyType(_checked_ttls(self.negative_ttl)))
        elif self.negative_ttl is not None:
            _check_number("negative_ttl", self.negative_ttl, at_least=0)
        limit = self.max_running
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"max_running must be a whole number, 1 or more, not {limit!r}")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigError(f"retry must be a Retry, such as Retry(max=3), not {self.retry!r}")
        try:
            BatchRequest("/", **self.for_request())
        except InvalidRequest as error:
            raise ConfigError(str(error)) from error

    def negative_for(self, error: BaseException) -> float | None:
        """Seconds that this error answers the same request, None = the settings say. The closest type counts."""
        if isinstance(self.negative_ttl, Mapping):
            ttls = self.negative_ttl
            return next((ttls[kind] for kind in type(error).__mro__ if kind in ttls), None)
        return self.negative_ttl

    def for_request(self) -> dict[str, Any]:
        """The options that a request of this route carries; what the route leaves open is left out."""
        names = ("operation", "sticky", "ttl", "queue", "priority", "estimated_time")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _check_number(what: str, value: object, *, at_least: float = -math.inf, above: float = -math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{what} must be a number, not {value!r}")
    if value < at_least or value <= above:
        raise ConfigError(
            f"{what} must be {f'{at_least:g} or more' if above == -math.inf else 'above 0'}, not {value!r}"
        )


def _checked_ttls(ttls: Mapping[type[BaseException], float]) -> dict[type[BaseException], float]:
    for kind, seconds in ttls.items():
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise ConfigError(f"negative_ttl: {kind!r} is no exception class")
        _check_number(f"negative_ttl for {kind.__name__}", seconds, at_least=0)
    return dict(ttls)


@dataclass(frozen=True, slots=True)
class _Target:
    """A canonical URI in the pieces that matching needs.

    ``site``: scheme and authority, empty when there is no authority. ``path``: still encoded. ``decoded``: the path
    decoded except for ``%25`` and, inside a segment, ``%2F``.
    """

    site: str
    path: str
    decoded: str
    query: str

    @classmethod
    def of(cls, canonical: str) -> _Target:
        scheme, authority, path, query = _URI.fullmatch(canonical).groups()  # type: ignore[union-attr]  # fits any text
        if authority is not None:
            return cls(f"{scheme or ''}://{authority}", path, _decode(path), query or "")
        # the canonical form writes a path that starts with // so, lest it read as a host
        path = path.removeprefix("/.") if path.startswith("/.//") else path
        return cls("", path, _decode(path), query or "")


def _decode(path: str) -> str:
    """Every segment decoded, with the two characters escaped that would make the result ambiguous."""
    if "%" not in path:
        return path
    return "/".join(unquote(part).replace("%", "%25").replace("/", "%2F") for part in path.split("/"))


def _plain(decoded: str) -> str:
    return decoded.replace("%2F", "/").replace("%25", "%")


@dataclass(frozen=True, slots=True)
class _Template:
    """A compiled URI template. ``pieces`` alternate between literal text, still encoded, and placeholder names."""

    text: str
    site: str
    regex: re.Pattern[str]
    converters: dict[str, str]
    pieces: tuple[str, ...]

    @classmethod
    def compile(cls, text: str) -> _Template:
        """Raises ConfigError that says what is wrong with the template."""
        site, path = _split_template(text)
        pieces = _PLACEHOLDER.split(path)
        converters: dict[str, str] = {}
        for index in range(1, len(pieces), 2):
            name, colon, converter = pieces[index].partition(":")
            if not name.isidentifier() or (colon and converter not in _CONVERTERS) or colon + converter == ":":
                known = ", ".join(f"{{name:{each}}}" for each in _CONVERTERS if each)
                raise ConfigError(f"template {text!r}: {{{pieces[index]}}} is none of {{name}}, {known}")
            if name in converters:
                raise ConfigError(f"template {text!r}: {{{name}}} stands there twice")
            if index > 1 and not pieces[index - 1]:
                raise ConfigError(f"template {text!r}: text must stand between two placeholders")
            converters[name], pieces[index] = converter, name
        literals = _check_literals(text, pieces[::2])
        regex = re.escape(_decode(literals[0]))
        for name, literal in zip(pieces[1::2], literals[1:], strict=True):
            regex += f"(?P<{name}>{_CONVERTERS[converters[name]][0]})" + re.escape(_decode(literal))
        return cls(text, site, re.compile(regex, re.DOTALL), converters, tuple(pieces))

    @classmethod
    def under(cls, prefix: str) -> _Template:
        """The template of everything at and below ``prefix``, which has no placeholders."""
        prefix = prefix.removesuffix("/")
        if _PLACEHOLDER.search(prefix):
            raise ConfigError(f"prefix {prefix!r}: placeholders cannot stand in a prefix")
        site, path = _split_template(prefix or "/")
        path = path.removesuffix("/")
        _check_literals(prefix, [path])
        regex = re.compile(re.escape(_decode(path)) + "(?:/.*)?", re.DOTALL)
        return cls(f"{prefix}/*", site, regex, {}, (path,))

    def match(self, target: _Target) -> dict[str, str] | None:
        """The decoded texts of the placeholders, None when the target is not one of ours."""
        if self.site and self.site != target.site:
            return None
        found = self.regex.fullmatch(target.decoded)
        return found and {name: _plain(text) for name, text in found.groupdict().items()}

    def build(self, texts: Mapping[str, str]) -> str:
        """The URI with the placeholders filled in, percent-encoded."""
        uri = quote(self.pieces[0], safe=_PCHAR + "/%")
        for name, literal in zip(self.pieces[1::2], self.pieces[2::2], strict=True):
            safe = _PCHAR + "/" if self.converters[name] == "path" else _PCHAR
            uri += quote(texts[name], safe=safe) + quote(literal, safe=_PCHAR + "/%")
        return f"/.{uri}" if uri.startswith("//") and not self.site else self.site + uri


def _split_template(text: str) -> tuple[str, str]:
    """The canonical scheme and authority, and the path as it stands there."""
    if text.startswith("/") and not text.startswith("//"):
        return "", text
    whole = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*://[^/{}?#]+)(/.*)?", text, re.DOTALL)
    if not whole:
        raise ConfigError(
            f"template {text!r} must start with / or with a scheme and a host, such as https://api.x.org/"
        )
    try:
        return _Target.of(BatchRequest(f"{whole[1]}/").canonical).site, whole[2] or "/"
    except InvalidRequest as error:
        raise ConfigError(f"template {text!r}: {error}") from error


def _check_literals(text: str, literals: list[str]) -> list[str]:
    joined = "\0".join(literals)
    if "?" in joined or "#" in joined:
        raise ConfigError(f"template {text!r}: ? and # cannot stand there; query parameters come from the signature")
    if "{" in joined or "}" in joined:
        raise ConfigError(f"template {text!r}: a brace stands alone")
    if any(_decode(part) in (".", "..") for part in joined.split("/")):
        raise ConfigError(f"template {text!r}: no canonical URI has the segments . and ..")
    return literals


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a handler that a request fills."""

    name: str
    kind: type
    many: bool = False
    default: Any = _MISSING

    def read(self, texts: list[str]) -> Any:
        """The value that the texts of a request stand for. Raises ValueError saying why there is none."""
        if self.many:
            return [_convert(text, self.kind) for text in texts]
        if len(texts) != 1:
            raise ValueError(f"is given {len(texts)} times, the handler takes one")
        return _convert(texts[0], self.kind)

    def write(self, value: Any) -> list[str]:
        """The texts that stand for a value; none when it is what a request without the parameter means.

        Raises ValueError saying why a request cannot carry it.
        """
        if value is None or (self.many and not isinstance(value, str) and not list(value)):
            if self.default is _MISSING or self.default:
                raise ValueError(f"{value!r} cannot stand in a request")
            return []
        if not self.many or isinstance(value, str):
            return [_text(value)]
        return [_text(each) for each in value]


def _convert(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if kind is int and re.fullmatch(_INT, text):
        return int(text)
    if kind is float and re.fullmatch(_FLOAT, text) and math.isfinite(float(text)):
        return float(text)
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    raise ValueError(f"{shown!r} is not {'true or false' if kind is bool else f'of type {kind.__name__}'}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{value!r} has no UTF-8 form") from None
        return text
    raise ValueError(f"{value!r} is no str, int, float or bool")


def _parameters(function: Callable[..., Any], converters: Mapping[str, str]) -> tuple[_Parameter, ...]:
    """What a request fills of a handler's signature, which starts with the request and the context.

    Raises ConfigError when the signature cannot be filled.
    """
    declared = list(_signature(function).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(declared) < 2 or any(each.kind not in positional for each in declared[:2]):
        raise ConfigError("its first two parameters must be the request and the context")
    filled = [each for each in declared[2:] if each.kind is not inspect.Parameter.VAR_KEYWORD]
    for each in filled:
        if each.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise ConfigError(f"parameter {each.name!r} cannot be filled by name")
    if lost := sorted(set(converters) - {each.name for each in filled}):
        raise ConfigError(f"its signature lacks {', '.join(lost)} of the template (a decorator needs functools.wraps)")
    return tuple(_parameter(function, each, converters.get(each.name)) for each in filled)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # names imported for type checkers only cannot be evaluated, and only some annotations matter
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _parameter(function: Callable[..., Any], declared: inspect.Parameter, converter: str | None) -> _Parameter:
    name, in_template = declared.name, converter is not None
    annotation = _evaluate(function, declared)
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    kinds: list[Any] = [each for each in options if each is not types.NoneType] or [annotation]
    many = kinds[0] is list or typing.get_origin(kinds[0]) is list
    if many:
        kinds = [*(typing.get_args(kinds[0]) or (str,)), *kinds[1:]]
    kind = str if kinds[0] in (_MISSING, Any, object) else kinds[0]
    if len(kinds) > 1 or kind not in (str, int, float, bool) or (many and in_template):
        shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        usable = "str, int, float, bool, Optional of those" + ("" if in_template else ", list of those")
        raise ConfigError(f"parameter {name!r}: the annotation {shown} is none of {usable}")
    if converter:
        given = _CONVERTERS[converter][1]
        if annotation not in (_MISSING, Any, object) and kind is not given:
            raise ConfigError(
                f"parameter {name!r}: the template gives {given.__name__}, the annotation is {kind.__name__}"
            )
        kind = given
    return _Parameter(name, kind, many, declared.default)


def _evaluate(function: Callable[..., Any], declared: inspect.Parameter) -> Any:
    """The annotation as an object; one by one, for those that are not ours may name what only type checkers see."""
    if declared.annotation is _MISSING:
        return _MISSING
    holder = types.SimpleNamespace(__annotations__={declared.name: declared.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=names)[declared.name]
    except (NameError, TypeError, SyntaxError) as error:
        raise ConfigError(f"parameter {declared.name!r}: the annotation cannot be read: {error}") from error


def takes(name: str, request: BatchRequest) -> bool:
    """Whether a route of this name, which is its template or operation, would take the request."""
    if request.operation:
        return request.operation == name
    try:
        template = _Template.compile(name)
    except ConfigError:
        return False
    return template.match(_Target.of(request.canonical)) is not None


class Handler(Generic[P, R]):
    """A function with its route. Calling it calls the function, as a unit test wants it."""

    __name__: str

    def __init__(self, function: Callable[P, R], route: Route, template: _Template | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.route = route
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._template = template
        self._parameters = _parameters(function, template.converters if template else {})
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
                    f"{_name(function)}: {self.route.name} has {_name(self.hooks[kind].function)} for that"
                )
            self.hooks[kind] = Hook(kind, function, self.route, **options)
            return function

        return register if function is None else register(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Handler {self.route.name!r}: {_name(self.function)}>"

    def lookup(self, function: AnyFunction) -> AnyFunction:
        """Let the decorated function look for the value before the handler is called: ``@cities.lookup``.

        It gets the arguments of the handler. What it returns completes the request; ``rqarm.MISS`` = it has none, call
        the handler. It may be async; an error in it is one of the handler, and its time counts as the handler's.

        Raises ConfigError when there is one already or its signature does not take the arguments.
        """
        if self.finder is not None:
            raise ConfigError(f"{_name(function)}: {_name(self.finder)} is the look-up of {self.route.name!r} already")
        try:
            _signature(function).bind(None, None, **dict.fromkeys(self.parameters))
        except TypeError as error:
            takes = ", ".join(("request", "context", *self.parameters))
            raise ConfigError(f"{_name(function)}: a look-up must take ({takes}), as its handler: {error}") from error
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
        return self._bind(request, _Target.of(request.canonical))

    def _bind(self, request: BatchRequest, target: _Target) -> dict[str, Any] | None:
        texts = self._take(request, target)
        return None if texts is None else self._arguments(texts)

    def _take(self, request: BatchRequest, target: _Target) -> dict[str, list[str]] | None:
        """The texts from query and path. An operation goes by its name alone, a route takes no operations."""
        if self._template:
            found = None if request.operation else self._template.match(target)
            return None if found is None else request.query | {name: [text] for name, text in found.items()}
        return request.query if self.route.operation in ("", request.operation) else None

    def _arguments(self, texts: Mapping[str, list[str]]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for parameter in self._parameters:
            where = f"parameter {parameter.name!r} of {self.route.name}"
            if parameter.name in texts:
                try:
                    arguments[parameter.name] = parameter.read(texts[parameter.name])
                except ValueError as error:
                    raise InvalidRequest(str(error), where=where) from None
            elif parameter.default is _MISSING:
                raise InvalidRequest("is missing and has no default", where=where)
        return arguments

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
                    raise InvalidRequest(
                        str(error), where=f"parameter {parameter.name!r} of {self.route.name}"
                    ) from None
        return {name: each for name, each in texts.items() if each}

    def _check_survival(self, request: BatchRequest, texts: Mapping[str, list[str]]) -> None:
        """Refuse what the canonical form changes: ``..`` as a segment, ``x-y`` where the template says ``{a}-{b}``."""
        found = self._take(request, _Target.of(request.canonical)) or {}
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
            raise ConfigError(f"{_name(function)}: {error}") from error
        functools.update_wrapper(self, function)
        self.kind, self.function, self.route = kind, function, route
        self.is_async = inspect.iscoroutinefunction(function)
        self.hooks = {}
        self._template, self._parameters = None, ()


def _check_hook(function: Callable[..., Any], given: int) -> bool:
    """Whether the function of a follow-up takes a context beside what it is given. Raises ConfigError."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError("it is a generator, of which nothing would ever run: nobody reads what it yields")
    parameters = _signature(function).parameters
    takes_context = "context" in list(parameters)[given:]
    try:
        _signature(function).bind(*range(given), **({"context": None} if takes_context else {}))
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
        return lambda function: self._add(function, options, lambda: _Template.compile(template))

    def operation(self, name: str, /, **options: Unpack[Options]) -> Callable[[Callable[P, R]], Handler[P, R]]:
        """Let the decorated function execute requests with this operation name, whatever their URI.

        The query fills its parameters as it does for ``route``. Raises ConfigError naming the function.
        """
        return lambda function: self._add(function, options, None, name)

    def fallback(self, function: Callable[P, R]) -> Handler[P, R]:
        """Let the decorated function execute what nothing else takes. Raises ConfigError when there is one already."""
        function = _bare(function)
        if self._fallback:
            raise ConfigError(f"{_name(function)}: {_name(self._fallback.function)} is the fallback already")
        try:
            handler = Handler(function, Route(name="fallback"))
        except ConfigError as error:
            raise ConfigError(f"{_name(function)}: {error}") from error
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
                raise ConfigError(f"{_name(function)}: {_name(self._consumer.function)} is for the quarantine already")
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
        target = _Target.of(request.canonical)
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
        target = _Target.of(request.canonical)
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
                f"{_name(other._fallback.function)}: {_name(self._fallback.function)} is the fallback already"
            )
        if self._consumer and other._consumer:
            theirs, ours = _name(other._consumer.function), _name(self._consumer.function)
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
        template = _under(prefix, app)

        def answer(request: BatchRequest, context: Context) -> Result:
            return _ask_wsgi(app, _mounted(request, template), context)

        self._add(_named(answer, app), options, lambda: template)

    def mount_asgi(self, app: Callable[..., Awaitable[None]], prefix: str = "", **options: Unpack[Options]) -> None:
        """Let an ASGI app execute the requests under ``prefix``, as a GET of the canonical URI.

        The app sees the prefix as root_path and the Context as ``scope["rqarm.context"]``; it gets no lifespan
        events. A 2xx answer is the result; a redirect or 4xx raises AppRefusal, anything else AppError. Raises
        ConfigError for a bad prefix.
        """
        template = _under(prefix, app)

        async def answer(request: BatchRequest, context: Context) -> Result:
            return await _ask_asgi(app, _mounted(request, template), context)

        self._add(_named(answer, app), options, lambda: template)

    def _add(
        self,
        function: Callable[P, R],
        options: Options,
        template: Callable[[], _Template] | None,
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
            raise ConfigError(f"{_name(function)}: {error}") from error
        self._handlers.append(handler)
        return handler

    def _check_name(self, handler: Handler[..., Any], *, same_pattern: bool = False) -> None:
        new = handler.route
        for other in self._handlers:
            old = other.route
            if (old.template, old.operation) == (new.template, new.operation):
                if not same_pattern:
                    raise ConfigError(f"{new.template or new.operation!r} is taken by {_name(other.function)}")
            elif old.name == new.name:
                raise ConfigError(f"the name {new.name!r} is taken by {_name(other.function)}")

    def _reason(self, operation: str, target: _Target) -> str:
        # without the query: its values may be secret
        if operation:
            asked, kind = repr(operation), "operation"
            known = {route.operation: route.operation for route in self.routes if route.operation}
            close = difflib.get_close_matches(operation, known, n=3, cutoff=0.5)
        else:
            asked, kind = repr(target.path), "route"
            texts = [route.template for route in self.routes if route.template]
            known = {_PLACEHOLDER.sub("", _split_template(text)[1]): text for text in texts}
            close = difflib.get_close_matches(target.path, known, n=3, cutoff=0.4)
        closest = ", ".join(known[each] for each in close)
        hint = f"closest: {closest}" if closest else f"none of {len(known)} is like it" if known else "there is none"
        return f"no {kind} takes {asked} ({hint}): register a handler or correct the request"


def _name(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(function)


def _bare(function: Callable[P, R]) -> Callable[P, R]:
    """The function below earlier decorators of ours, so that one function can have several routes."""
    return function.function if isinstance(function, Handler) else function


def _named(function: Callable[P, R], app: object) -> Callable[P, R]:
    kind = app if hasattr(app, "__qualname__") else type(app)
    function.__module__, function.__qualname__ = kind.__module__, kind.__qualname__
    return function


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
            raise ConfigError(f"resource {name!r} is registered twice: {_name(factory)}, {_name(self.factories[name])}")
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
                    _check_end(name, next(running, _MISSING) if running else _MISSING)
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
                    value = await anext(running, _MISSING)
                    if value is _MISSING:
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
                    _check_end(name, await anext(running, _MISSING))
                else:
                    _check_end(name, next(running, _MISSING) if running else _MISSING)
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
                value = next(running, _MISSING)
                if value is _MISSING:
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
    if again is not _MISSING:
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


@dataclass(frozen=True, slots=True)
class _Get:
    """A GET as both gateway protocols see it. ``script`` and ``path`` are encoded, ``script`` is the prefix."""

    scheme: str
    host: str
    server: tuple[str, int]
    script: str
    path: str
    query: str

    @property
    def target(self) -> str:
        # without the query: its values may be secret
        return self.script + self.path


def _under(prefix: str, app: object) -> _Template:
    try:
        return _Template.under(prefix)
    except ConfigError as error:
        raise ConfigError(f"mount of {app!r}: {error}") from error


def _mounted(request: BatchRequest, template: _Template) -> _Get:
    target = _Target.of(request.canonical)
    scheme, _, authority = target.site.partition("://")
    host = authority.rpartition("@")[2] or "localhost"
    name, port = re.fullmatch(r"(.*?)(?::([0-9]*))?", host).groups()  # type: ignore[union-attr]
    # segments are never merged by decoding, so they can be counted
    parts = target.path.split("/")
    depth = template.pieces[0].count("/") + 1
    return _Get(
        scheme or "http",
        host,
        (name, int(port or (443 if scheme == "https" else 80))),
        "/".join(parts[:depth]),
        "/".join(["", *parts[depth:]]) if parts[depth:] else "",
        target.query,
    )


def _result(
    status: int, headers: Iterable[tuple[str, str]], start: bytes, rest: Iterator[bytes] | None, get: _Get
) -> Result:
    """The result that a mounted app's answer stands for; ``rest`` is what follows ``start``, if anything does.

    Raises AppRefusal or AppError when the answer is no result.
    """
    message = Message()
    for name, value in headers:
        message[name] = value
    if 200 <= status < 300:
        filename = re.split(r"[/\\]", message.get_filename() or "")[-1]
        return Result(
            start if rest is None else itertools.chain([start], rest),
            content_type=message["Content-Type"],
            filename=filename if filename not in ("", ".", "..") else None,
        )
    shown = start[:_ERROR_BYTES].decode("utf-8", "replace")
    if 300 <= status < 400:
        shown = f"redirects to {message['Location']} are not followed"
    raise (AppRefusal if 300 <= status < 500 else AppError)(status, get.target, shown)


def _ask_wsgi(app: Callable[..., Iterable[bytes]], get: _Get, context: Context) -> Result:
    # PEP 3333: paths are bytes, each as the Latin-1 character of its number
    environ = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": unquote_to_bytes(get.script).decode("latin-1"),
        "PATH_INFO": unquote_to_bytes(get.path).decode("latin-1"),
        "QUERY_STRING": get.query,
        "SERVER_NAME": get.server[0],
        "SERVER_PORT": str(get.server[1]),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": get.host,
        "HTTP_ACCEPT": "*/*",
        "HTTP_ACCEPT_ENCODING": "identity",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": get.scheme,
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "rqarm.context": context,
    }
    started: list[tuple[str, list[tuple[str, str]]]] = []
    start = bytearray()

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        started.append((status, headers))
        return start.extend

    stream = _closing(app(environ, start_response))
    for chunk in stream:
        start += chunk
        if len(start) > _AHEAD_BYTES:
            break
    if not started:
        raise AppError(500, get.target, "the app returned without calling start_response")
    status, headers = started[-1]
    code = int(status.split(" ", 1)[0])
    if not 200 <= code < 300:
        stream.close()
    return _result(code, headers, bytes(start), stream if len(start) > _AHEAD_BYTES else None, get)


def _closing(chunks: Iterable[bytes]) -> Generator[bytes, None, None]:
    try:
        yield from chunks
    finally:
        close = getattr(chunks, "close", None)
        if close:
            close()


async def _ask_asgi(app: Callable[..., Awaitable[None]], get: _Get, context: Context) -> Result:
    scope = {
        "type": "http",
        # with 2.4 a failed send tells of a client that left, so Starlette does not listen for it while it streams
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": get.scheme,
        # the path includes the root_path (ASGI, HTTP connection scope)
        "path": unquote(get.script + get.path),
        "raw_path": (get.script + get.path).encode("ascii"),
        "query_string": get.query.encode("ascii"),
        "root_path": unquote(get.script),
        "headers": [(b"host", get.host.encode("ascii")), (b"accept", b"*/*"), (b"accept-encoding", b"identity")],
        "client": ("127.0.0.1", 0),
        "server": get.server,
        "rqarm.context": context,
    }
    # The core imports no event loop. Whoever awaits this runs one already, and only it can let `receive` sleep:
    # Quart and Django listen for a disconnect as long as they work, and one that comes at once ends their work.
    over = sys.modules["asyncio"].Event()
    events: list[dict[str, Any]] = [{"type": "http.request", "body": b"", "more_body": False}]
    started: list[MutableMapping[str, Any]] = []
    body = io.BytesIO()

    async def receive() -> dict[str, Any]:
        if events:
            return events.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.append(message)
        elif message["type"] == "http.response.body":
            body.write(message.get("body", b""))
            if not message.get("more_body", False):
                over.set()

    try:
        await app(scope, receive, send)
    finally:
        over.set()
    if not started:
        raise AppError(500, get.target, "the app returned without an answer")
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in started[-1].get("headers", ())]
    return _result(started[-1]["status"], headers, body.getvalue(), None, get)

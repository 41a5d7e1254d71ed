"""The parameters of a handler that a request fills, read from its signature, and how texts become their values."""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rqarm.errors import ConfigError
from rqarm.templates import CONVERTERS, FLOAT, INT

_BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_MISSING: Any = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a handler that a request fills."""

    name: str
    kind: type
    many: bool = False
    default: Any = _MISSING

    @property
    def is_required(self) -> bool:
        return self.default is _MISSING

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
            if self.is_required or self.default:
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
    if kind is int and re.fullmatch(INT, text):
        return int(text)
    if kind is float and re.fullmatch(FLOAT, text) and math.isfinite(float(text)):
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


def parameters_of(function: Callable[..., Any], converters: Mapping[str, str]) -> tuple[Parameter, ...]:
    """What a request fills of a handler's signature, which starts with the request and the context.

    Raises ConfigError when the signature cannot be filled.
    """
    declared = list(signature_of(function).parameters.values())
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


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # names imported for type checkers only cannot be evaluated, and only some annotations matter
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _parameter(function: Callable[..., Any], declared: inspect.Parameter, converter: str | None) -> Parameter:
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
        given = CONVERTERS[converter][1]
        if annotation not in (_MISSING, Any, object) and kind is not given:
            raise ConfigError(
                f"parameter {name!r}: the template gives {given.__name__}, the annotation is {kind.__name__}"
            )
        kind = given
    return Parameter(name, kind, many, declared.default)


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

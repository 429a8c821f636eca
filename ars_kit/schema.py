"""Typed values from text and TOML: an annotation is the schema, a signature is the form.

Used for the run's own settings and for every plugin's, so that both complain in the same words.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from ars_kit.errors import ConfigError

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True, slots=True)
class Choice:
    """An offer chosen by name, with the settings it should be made with.

    Written ``name`` or ``name:key=value,key=value`` on the command line.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the form that :func:`parse_choice` reads."""
        if not self.settings:
            return self.name
        return f"{self.name}:" + ",".join(f"{k}={v}" for k, v in self.settings.items())


def parse_choice(text: str) -> Choice:
    """Read ``name:key=value,key=value``.

    A comma that no ``key=`` follows belongs to the value before it, so lists need no quoting.

    Raises:
        ConfigError: something after the colon is not ``key=value``.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise ConfigError(f"{text!r} names nothing; write NAME or NAME:key=value")
    if not colon:
        return Choice(name)
    settings: dict[str, Any] = {}
    for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read {part!r} in {text!r}; write NAME:key=value,key=value")
        settings[key.strip()] = value.strip()
    return Choice(name, settings)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` where one of ``known`` is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One keyword parameter of an offer's ``make``, as ``arskit plugins show`` prints it."""

    name: str
    annotation: Any
    default: Any
    required: bool
    doc: str = ""

    @property
    def type_name(self) -> str:
        """The annotation in words a user reads."""
        return describe(self.annotation)


def signature_of(make: Callable[..., Any]) -> dict[str, Setting]:
    """Return the settings of ``make``: its keyword-only parameters, in order."""
    docs = _argument_docs(inspect.getdoc(make) or "")
    settings = {}
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        required = parameter.default is inspect.Parameter.empty
        settings[parameter.name] = Setting(
            parameter.name,
            _annotation(make, parameter),
            None if required else parameter.default,
            required,
            docs.get(parameter.name, ""),
        )
    return settings


def bind(
    owner: str, make: Callable[..., Any], raw: Mapping[str, Any], supplied: Collection[str] = ()
) -> dict[str, Any]:
    """Check ``raw`` settings against the signature of ``make`` and give them their types.

    Args:
        owner: how the offer is called in a complaint, such as ``'clip'``.
        make: the offer's callable.
        raw: settings as text or as TOML values.
        supplied: parameters that the host fills itself, so that a user need not.

    Raises:
        ConfigError: an unknown setting, a wrong type, or a missing required one.
    """
    known = signature_of(make)
    for key in raw:
        if key not in known:
            has = ", ".join(known) if known else "no settings"
            hint = did_you_mean(key, known)
            raise ConfigError(f"{owner} has no setting {key!r}{hint}. It has: {has}.")
    missing = [k for k, s in known.items() if s.required and k not in raw and k not in supplied]
    if missing:
        raise ConfigError(f"{owner} needs a value for {', '.join(missing)}")
    return {k: coerce(v, known[k].annotation, f"{owner}: {k}") for k, v in raw.items()}


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Return ``value`` as ``annotation`` wants it; text is parsed, TOML values are checked.

    Raises:
        ConfigError: the value does not fit, with what would.
    """
    try:
        return _coerce(value, annotation)
    except (ValueError, TypeError) as error:
        detail = f" ({error})" if str(error) else ""
        wanted = describe(annotation)
        raise ConfigError(f"{where} must be {wanted}, not {value!r}{detail}") from None


def describe(annotation: Any) -> str:
    """Say an annotation in words: ``a whole number``, ``one of bf16, fp32``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) if a is not type(None) else "'none'" for a in args)
    if origin in (tuple, list):
        inner = describe(args[0] if args else str)
        if origin is tuple and args[-1:] != (Ellipsis,) and args:
            return f"{len(args)} values with a comma between ({inner})"
        return f"a list ({inner})"
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Choice: "NAME or NAME:key=value",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _coerce(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args)
    if origin is Literal:
        match = [a for a in args if a == value or str(a) == value]
        if not match:
            raise ValueError
        return match[0]
    if origin in (tuple, list):
        return _coerce_sequence(value, origin, args)
    scalars: dict[Any, Callable[[Any], Any]] = {
        Choice: lambda v: v if isinstance(v, Choice) else parse_choice(_text(v)),
        bool: _coerce_bool,
        int: _coerce_int,
        float: _coerce_float,
        str: _text,
    }
    return scalars.get(annotation, lambda v: v)(value)


def _coerce_union(value: Any, args: tuple[Any, ...]) -> Any:
    none = type(None)
    if none in args and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    last: Exception = ValueError()
    for option in (a for a in args if a is not none):
        try:
            return _coerce(value, option)
        except (ValueError, TypeError) as error:
            last = error
    raise last


def _coerce_sequence(value: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [value]
    fixed = origin is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ValueError(f"needs {len(args)} values")
    inner = args if fixed else (args[0] if args else str,) * len(value)
    return origin(_coerce(v, a) for v, a in zip(value, inner, strict=True))


def _coerce_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = _text(value).lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError


def _coerce_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)  # to the last digit, which a float has not beyond 2^53
        except ValueError:
            pass
    number = float(str(value).replace("_", ""))  # 1e6 is a natural way to write a token count
    if not number.is_integer():
        raise ValueError
    return int(number)


def _coerce_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if math.isnan(number):  # every comparison with it is false, so no check of a range holds it up
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _annotation(make: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Resolve one annotation; a name only the type checker imports falls back to the default."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        function = make.__init__ if inspect.isclass(make) else make
        namespace = {**vars(typing), **getattr(inspect.unwrap(function), "__globals__", {})}
        try:
            return eval(annotation, namespace)  # noqa: S307 -- the plugin's own annotation
        except (NameError, AttributeError, TypeError, SyntaxError):
            annotation = inspect.Parameter.empty
    if annotation is not inspect.Parameter.empty:
        return annotation
    known = parameter.default not in (None, inspect.Parameter.empty)
    return type(parameter.default) if known else str


def _argument_docs(doc: str) -> dict[str, str]:
    """Read the ``Args:`` section of a Google-style docstring."""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if not match:
        return {}
    entries: dict[str, str] = {}
    name = ""
    for line in match.group(1).splitlines():
        start = re.match(r"^\s{1,4}(\w+)(?: \([^)]*\))?:\s*(.*)$", line)
        if start:
            name = start.group(1)
            entries[name] = start.group(2)
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return entries

"""The public functions as their callers see them: options named in signatures, and one line for a wrong or unknown one.

`**options: Unpack[T]` is shown as the keys of T. Knows no function in particular, and no value's range.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import os
import re
from collections.abc import Callable
from typing import Any, ForwardRef

from mezzotint.errors import ConfigError, shown

PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: hasattr(value, "__index__"), "a whole number"),
    "float": (lambda value: hasattr(value, "__float__") or hasattr(value, "__index__"), "a number"),
    "str": (lambda value: isinstance(value, str), "text"),
    "bytes": (lambda value: isinstance(value, (bytes, bytearray, memoryview)), "bytes"),
    "bool": (lambda value: type(value).__name__ in ("bool", "bool_"), "True or False"),
    "Path": (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
    "None": (lambda value: value is None, "None"),
}
"""What annotations of plain values take, and how it is called."""


def _words(annotation: Any) -> str:
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)


def expanded(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with the keys of `**options: Unpack[T]` in place of `options`; their default is shown as `...`."""
    signature = inspect.signature(function)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        found = re.fullmatch(r"Unpack\[(\w+)\]", _words(parameter.annotation))
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD or found is None:
            parameters.append(parameter)
            continue
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=_words(annotation))
            for name, annotation in inspect.get_annotations(function.__globals__[found[1]]).items()
        ]
    return signature.replace(parameters=parameters)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bytes, numbers.Number))


def _wrong(annotation: Any, value: Any) -> str | None:
    """What an annotation asks for, where the value is plainly something else; None where it is that, or may be.

    Only what cannot be meant is refused: other plain values, and a name, a number or nothing in place of a thing. What
    merely behaves like a thing may stand for it.
    """
    kinds = [kind.strip() for kind in _words(annotation).split("|")]
    if not all(re.fullmatch(r"[A-Za-z_.]+", kind) for kind in kinds) or {"Any", "object"} & set(kinds):
        return None
    plain = [PLAIN[kind] for kind in kinds if kind in PLAIN]
    things = [kind for kind in kinds if kind not in PLAIN]
    if isinstance(value, bool) and "bool" not in kinds:
        fits = False
    elif any(takes(value) for takes, _ in plain):
        fits = True
    else:
        fits = bool(things) and not _is_plain(value)
    if fits:
        return None
    called = [f"a {kind}" for kind in things]
    called += [words for _, words in plain if words != "None" and not (words == "text" and "Path" in kinds)]
    return " or ".join(called) + (" or None" if "None" in kinds else "")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its options named in its signature, and told apart before it runs.

    Raises ConfigError, in one line that names the function and the known options, for one that it does not have or
    that is plainly of another type.
    """
    signature = expanded(function)
    named = {n: p for n, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    open_ended = len(named) < len(signature.parameters)
    call = f"{function.__name__}()"
    known = f"known: {', '.join(named)}"

    @functools.wraps(function)
    def public(*values: Any, **options: Any) -> Any:
        for name in options:
            if name not in named and not open_ended:
                near = difflib.get_close_matches(name, named, 1)
                meant = f", did you mean {near[0]}?" if near else ";"
                raise ConfigError(f"{call} has no option {name!r}{meant} {known}")
        try:
            bound = signature.bind(*values, **options)
        except TypeError as error:
            raise ConfigError(f"{call}: {error}; {known}") from None
        for name, value in bound.arguments.items():
            if name in named and (asked := _wrong(named[name].annotation, value)):
                given = shown(value) if len(shown(value)) <= 40 else type(value).__name__
                more = ": load it by mezzotint.load" if asked == "a Model" and value is not None else ""
                raise ConfigError(f"{call}: {name} must be {asked}, not {given}{more}; {known}")
        return function(*values, **options)

    public.__signature__ = signature  # type: ignore[attr-defined]
    return public

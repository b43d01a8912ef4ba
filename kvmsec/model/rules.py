"""What may stand as a value in a file that people write, whoever reads the file.

A rule takes what TOML or JSON gave and returns the parsed value, or raises ValueError that says
what it must be.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from kvmsec.linux.errors import Fault
from kvmsec.model.security import SecurityModel
from uidpool.ranges import UidRanges

_T = TypeVar("_T")
Rule = Callable[[object], _T]


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {kind_of(value)}")
    if not value.isprintable():
        raise ValueError("must hold printable characters only")
    return value


def true_or_false(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {kind_of(value)}")
    return value


def one_of(*choices: str) -> Rule[str]:
    def rule(value: object) -> str:
        if text(value) not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {_shown(value)}")
        return cast(str, value)

    return rule


def whole_number(least: int, most: int) -> Rule[int]:
    def rule(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be a whole number, not {kind_of(value)}")
        if not least <= value <= most:
            raise ValueError(f"must be between {least} and {most}")
        return value

    return rule


def seconds(least: float, most: float) -> Rule[float]:
    def rule(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"must be a number of seconds, not {kind_of(value)}")
        if not least <= value <= most:  # which NaN is not either
            raise ValueError(f"must be between {least:g} and {most:g} seconds")
        return float(value)

    return rule


def list_of(rule: Rule[_T]) -> Rule[tuple[_T, ...]]:
    def each(value: object) -> tuple[_T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"must be a list, not {kind_of(value)}")
        return tuple(rule(item) for item in value)

    return each


def uid_ranges(value: object) -> UidRanges:
    try:
        return UidRanges.parse(text(value))
    except Fault as error:
        raise ValueError(error.message) from error


def absolute_path(value: object) -> Path:
    path = Path(text(value))
    if not path.is_absolute():
        raise ValueError(f"must be an absolute path, not {_shown(value)}")
    return path


def security_model(value: object) -> SecurityModel:
    return SecurityModel(one_of(*(model.value for model in SecurityModel))(value))


def unknown_key(key: str, known: Mapping[str, object], what: str) -> str:
    """The words for a key that nobody asked for, with the one that was probably meant."""
    from difflib import get_close_matches  # only a mistake pays for it

    close = get_close_matches(key, known, n=1)
    advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f"unknown {what}; {advice}"


def shown_key(key: str) -> str:
    """A key as it may stand in a message: control characters escaped, never longer than a line."""
    return key if key.isascii() and key.isidentifier() and len(key) <= 60 else _shown(key)


def kind_of(value: object) -> str:
    names = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    names |= {list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    short = ascii(value)
    return short if len(short) <= 60 else short[:57] + "..."

"""From what people write (TOML, JSON, command line options) to a machine, or to every fault in it.

Three steps, so that options may win over a file: an option's text becomes a plain mapping, `merge`
lays mappings over each other, and `machine_from` makes the machine, once.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from hypervisor.errors import Problem, SpecError
from hypervisor.machine import Backing, Disk, Limits, Machine, Nic, Rule, mac_address

__all__ = [
    "Backing",
    "Disk",
    "Limits",
    "Machine",
    "Nic",
    "disk_from_option",
    "mac_address",
    "machine_from",
    "merge",
    "nic_from_option",
]

_DISK_KEYS: Final = frozenset(attrs.fields_dict(Disk)) | {"backing_format"}
_NIC_KEYS: Final = frozenset(attrs.fields_dict(Nic))
_MOST_ELEMENTS: Final = 32
"""More than any list may have, whose own rule says how many; each fault in one costs 2 KiB."""
_MOST_PROBLEMS: Final = 100
_SWITCHES: Final = {"on": True, "true": True, "off": False, "false": False}


class _Fault(ValueError):
    """A value that breaks its field's type or rule; the message is for the person who wrote it."""


def machine_from(mapping: Mapping[str, object], *, source: str) -> Machine:
    """Make a machine of what a TOML or JSON file, or `merge`, holds.

    Unknown keys and values of another type are refused (a number in quotes is no number). Raises
    SpecError with every fault and its place, such as `disks[1].format`, up to a hundred of them;
    `source` names the file.
    """
    try:
        return _CONVERTER.structure(mapping, Machine)
    except (ClassValidationError, _Fault) as error:
        raise SpecError(source, _first_problems(_problems_in(error, ""))) from None


def _first_problems(found: Iterator[Problem]) -> Iterator[Problem]:
    """What another node has sent may be wrong in a hundred thousand ways."""
    yield from islice(found, _MOST_PROBLEMS)
    if next(found, None) is not None:
        yield Problem("", f"and more: these are the first {_MOST_PROBLEMS}")


def merge(base: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """Lay options over a definition: what is given in `overrides` wins, key by key.

    None stands for an option that wasn't given. A table is laid over the table below it in the
    same way; a list replaces the list below it whole: a disk given as an option doesn't join those
    of the file.
    """
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        elif value is not None:
            merged[key] = value
    return merged


def disk_from_option(text: str, *, folder: Path | None = None) -> dict[str, object]:
    """Read `PATH[,format=qcow2][,readonly=on][,backing=PATH[,backing-format=FORMAT]]…`.

    A comma in a value is written twice, as QEMU has it. `backing` may be repeated, nearest first.
    Relative paths are taken from `folder`, and left for `machine_from` to refuse without one.
    Returns an element for a definition's `disks`; its values are judged by `machine_from`. Raises
    SpecError for what can't be read at all.
    """
    return _Option("--disk", text, _DISK_KEYS, bare="path").disk(folder or Path())


def nic_from_option(text: str) -> dict[str, object]:
    """Read `tap=NAME|bridge=NAME[,mac=ADDRESS][,model=MODEL][,vhost=on]`; see `disk_from_option`.

    Returns an element for a definition's `nics`.
    """
    return _Option("--nic", text, _NIC_KEYS).nic()


class _Option:
    """The parts of one option's text, and what was wrong with them."""

    def __init__(self, source: str, text: str, known: frozenset[str], bare: str = "") -> None:
        self._source = f"{source} {text!a}" if len(text) <= 200 else source
        self._problems: list[Problem] = []
        self._pairs = list(self._split(text, known, bare))

    def _split(self, text: str, known: frozenset[str], bare: str) -> Iterator[tuple[str, str]]:
        for index, part in enumerate(_split_at_commas(text)):
            written, equals, value = part.partition("=")
            key = written.replace("-", "_")
            # A path may hold `=`: only a known key and a value make the first part something else.
            if index == 0 and bare and not (equals and key in known):
                yield bare, part
            elif not equals:
                self._complain("", f"{part!a} is not KEY=VALUE")
            elif key not in known:
                self._complain("", f"{written!a} is not one of {', '.join(sorted(known))}")
            else:
                yield key, value

    def disk(self, folder: Path) -> dict[str, object]:
        chain: list[dict[str, object]] = []
        others: list[tuple[str, str]] = []
        for key, value in self._pairs:
            if key == "backing":
                chain.append({"path": str(folder / value)})
            elif key == "backing_format" and (not chain or "format" in chain[-1]):
                self._complain(key, "follows no backing file of its own")
            elif key == "backing_format":
                chain[-1]["format"] = value
            else:
                others.append((key, value))
        disk = self._mapping(others, switches=("readonly",))
        if disk.get("path"):
            disk["path"] = str(folder / str(disk["path"]))
        else:
            self._complain("path", "is missing")
        if chain:
            disk["backing"] = chain
        return self._checked(disk)

    def nic(self) -> dict[str, object]:
        return self._checked(self._mapping(self._pairs, switches=("vhost",)))

    def _mapping(
        self, pairs: list[tuple[str, str]], switches: tuple[str, ...]
    ) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                self._complain(key, "is given twice")
            if key not in switches:
                result[key] = value
            elif value in _SWITCHES:
                result[key] = _SWITCHES[value]
            else:
                self._complain(key, f"{value!a} is not on or off")
        return result

    def _complain(self, where: str, what: str) -> None:
        self._problems.append(Problem(where, what))

    def _checked(self, result: dict[str, object]) -> dict[str, object]:
        if self._problems:
            raise SpecError(self._source, self._problems)
        return result


def _split_at_commas(text: str) -> Iterator[str]:
    """The parts between single commas, with doubled ones made single (QEMU's get_opt_value)."""
    part = ""
    rest = text
    while True:
        head, comma, rest = rest.partition(",")
        part += head
        if not comma:
            yield part
            return
        if rest.startswith(","):
            part += ","
            rest = rest[1:]
        else:
            yield part
            part = ""


def _converter() -> Converter:
    # cattrs would turn "5" into 5, 5 into "5" and "no" into True: what is written must be meant.
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, words in ((int, "a whole number"), (str, "a text"), (bool, "true or false")):
        converter.register_structure_hook(kind, _strictly(kind, words))
    converter.register_structure_hook(Path, lambda value, _: Path(_text(value)))
    converter.register_structure_hook_func(_is_literal, lambda value, _: _text(value))
    converter.register_structure_hook_factory(_is_optional, _optional_hook)
    converter.register_structure_hook_factory(_is_tuple, _tuple_hook)
    # In this order: each class's hook is built from those of the classes in it.
    for defined in (Backing, Disk, Nic, Limits, Machine):
        converter.register_structure_hook(defined, _class_hook(defined, converter))
    return converter


def _is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _is_tuple(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is tuple


def _strictly(kind: type, words: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not kind:  # isinstance would take True for 1
            raise _Fault(f"{_shown(value)} is not {words}")
        return value

    return hook


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{_shown(value)} is not a text")
    return value


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind)


def _optional_hook(kind: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    (inner,) = (choice for choice in get_args(kind) if choice is not type(None))

    def hook(value: Any, _: Any) -> Any:
        return None if value is None else converter.structure(value, inner)

    return hook


def _tuple_hook(kind: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    element = get_args(kind)[0]

    def hook(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _Fault(f"{_shown(value)} is not a list")
        if len(value) > _MOST_ELEMENTS:
            raise _Fault(f"{len(value)} elements, at most {_MOST_ELEMENTS} are taken by any list")
        made, errors = [], []
        for index, item in enumerate(value):
            try:
                made.append(converter.structure(item, element))
            except Exception as error:  # collected, and raised below
                error.add_note(IterableValidationNote(f"element {index}", index, element))
                errors.append(error)
        if errors:
            raise IterableValidationError("a list", errors, kind)
        return tuple(made)

    return hook


def _class_hook(kind: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    rules: dict[str, Any] = {
        attribute.name: override(struct_hook=_ruled_hook(converter, attribute.validator))
        for attribute in attrs.fields(kind)
    }
    structure = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True, **rules)

    def hook(value: Any, _: Any) -> Any:
        if kind is Backing and isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, Mapping):
            raise _Fault(f"{_shown(value)} is not a table")
        return structure(value, kind)

    return hook


def _ruled_hook(converter: Converter, rule: object) -> Callable[[Any, Any], Any]:
    """Check a field's rule with its type, so that faults of several fields come together."""

    def hook(value: Any, kind: Any) -> Any:
        made = converter.structure(value, kind)
        problem = rule.check(made) if isinstance(rule, Rule) else None
        if problem is not None:
            raise _Fault(problem)
        return made

    return hook


def _problems_in(error: BaseException, where: str) -> Iterator[Problem]:
    """Walk cattrs' tree of exceptions; its notes tell which field or element each is about."""
    match error:
        case ClassValidationError() | IterableValidationError():
            for inner in error.exceptions:
                yield from _problems_in(inner, _place(inner, where))
        case ForbiddenExtraKeysError():
            known = ", ".join(attribute.name for attribute in attrs.fields(error.cl))
            for key in sorted(map(str, error.extra_fields)):
                yield Problem(where, f"unknown key {_shown(key)} (known are {known})")
        case SpecError():
            for problem in error.problems:
                yield Problem(_join(where, problem.where), problem.what)
        case KeyError():
            yield Problem(where, "is missing")
        case _Fault():
            yield Problem(where, str(error))
        case _:
            raise error


def _place(error: BaseException, where: str) -> str:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return _join(where, note.name)
        if isinstance(note, IterableValidationNote):
            return f"{where}[{note.index}]"
    return where


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where and name else where or name


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


_CONVERTER: Final = _converter()

"""docs/configuration.md names every key with its default, and its examples are read for real."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from hypervisor.extra_arguments import ALLOWED, check_extra_arguments
from hypervisor.machine import Backing, Disk, Limits, Machine, Nic
from kvmsec.cli.instance import start
from kvmsec.config import Config, parse_config, show_config
from kvmsec.model.instance import InstanceDefinition, definition_from

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/configuration.md"
NOT_SET = "\N{EN DASH}"

_FENCE = re.compile(r"^```(?P<info>[^\n]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| `(?P<key>[a-z_]+)` \| (?P<default>[^|]+) \|", re.MULTILINE)


def _section(heading: str) -> str:
    _, _, rest = PAGE.read_text().partition(f"\n{heading}\n")
    assert rest, f"no section {heading}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def _rows(heading: str) -> dict[str, str]:
    return {row["key"]: row["default"].strip() for row in _ROW.finditer(_section(heading))}


def _shown(value: object) -> str:
    if value == Limits():
        return "`{}`"
    return NOT_SET if value is None else f"`{json.dumps(value)}`"


def _defaults(kind: type, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        one.name: "required" if one.default is attrs.NOTHING else _shown(one.default)
        for one in attrs.fields(kind)
        if one.name not in without
    }


@pytest.mark.parametrize("table", [one.name for one in attrs.fields(Config)])
def test_every_setting_is_there_with_its_default(table: str, tmp_path: Path) -> None:
    expected = {
        setting.key.partition(".")[2]: _shown(setting.value)
        for setting in show_config(tmp_path / "missing.toml")
        if setting.key.startswith(f"{table}.")
    }

    assert _rows(f"### `[{table}]`") == expected


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("### Under which security it runs", _defaults(InstanceDefinition, without=("machine",))),
        ("### The machine", _defaults(Machine)),
        ("### Its limits", _defaults(Limits)),
        ("### Disks", _defaults(Disk)),
        ("### Backing files", _defaults(Backing)),
        ("### NICs", _defaults(Nic)),
    ],
)
def test_every_key_of_a_definition_is_there_with_its_default(
    heading: str, expected: dict[str, str]
) -> None:
    assert _rows(heading) == expected


def test_every_extra_argument_that_is_allowed_is_there_and_no_other() -> None:
    listed = re.findall(r"^\| `(-[a-z-]+)` \|", _section("## Extra QEMU arguments"), re.MULTILINE)

    assert sorted(listed) == sorted(ALLOWED)


def test_every_option_that_makes_a_machine_is_there_and_no_other() -> None:
    makes_none = {"--spec", "--node"}
    options = {name for option in start.params for name in option.opts if name.startswith("--")}
    listed = re.findall(r"`(--[a-z-]+)", _section("## The same on the command line"))

    assert sorted(set(listed) - makes_none) == sorted(options - makes_none)


def _toml_examples() -> Iterator[tuple[str, str, str]]:
    for page in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"):
        for example in _FENCE.finditer(page.read_text()):
            language, _, kind = example["info"].partition(" ")
            if language == "toml":
                yield page.name, kind, example["body"]


def test_there_are_examples() -> None:
    assert {kind for _, kind, _ in _toml_examples()} == {"kvmsec.toml", "instance"}


@pytest.mark.parametrize(("page", "kind", "text"), list(_toml_examples()))
def test_an_example_is_read_without_a_fault(page: str, kind: str, text: str) -> None:
    document = tomllib.loads(text)

    if kind == "kvmsec.toml":
        settings = parse_config(document, Path(page))
        check_extra_arguments(settings.qemu.extra_arguments)
    else:
        definition_from(document, "example", source=page)

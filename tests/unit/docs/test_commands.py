"""Every `kvmsec …` of the pages and of the code's hints is a command that has these options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvmsec.cli.main import kvmsec

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for package in ("kvmsec", "uidpool", "firewall", "hypervisor")
    for path in sorted((ROOT / package).rglob("*.py"))
]

_NOUNS = kvmsec.list_commands(click.Context(kvmsec))
_NOUN = rf"(?:{'|'.join(_NOUNS)})\b"
_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
# A shell's end of a command, a comment, or the blanks before what a page says of it.
_END = re.compile(r"\s{2,}|\s#|\s&&|;|:(?=\s|$)|\)|,(?=\s|$)|`")
_FILLED_IN = "…"
"""What stands in for the values of an f-string."""

_LITERAL = re.compile(r"[a-z][a-z0-9-]*")


def faults(command: str) -> list[str]:
    """What of a command line is not to be found in the tree of commands."""
    return list(_faults(_END.split(command.strip(), maxsplit=1)[0].split()))


def _faults(words: list[str]) -> Iterator[str]:
    above: click.Command = kvmsec
    at: click.Command = kvmsec
    arguments = 0
    rest = iter(words)
    for word in rest:
        plain = word.strip("[].")
        if plain.startswith("-"):
            yield from _option_faults(at, plain, rest)
        elif plain == "|":
            at, arguments = above, 0
        elif isinstance(at, click.Group):
            below = at.get_command(click.Context(at), plain)
            if below is None:
                if plain not in ("", _FILLED_IN):
                    yield f"{at.name} has no command {plain}"
                return
            above, at = at, below
        elif plain:
            arguments += 1
            takes = sum(isinstance(one, click.Argument) for one in at.params)
            if arguments > takes:
                yield f"{at.name} takes {takes} arguments, and not {plain} as well"
                return


def _option_faults(at: click.Command, word: str, rest: Iterator[str]) -> Iterator[str]:
    for name in word.partition("=")[0].split("|"):
        option = next((one for one in at.params if name in one.opts), None)
        if not isinstance(option, click.Option):
            if name not in ("-h", "--help"):
                yield f"{at.name} has no option {name}"
        elif not option.is_flag:
            value = next(rest, "")
            literals = [one for one in value.strip("[]").split("|") if _LITERAL.fullmatch(one)]
            if isinstance(option.type, click.Choice):
                for one in set(literals) - set(option.type.choices):
                    yield f"{at.name} {name} can't be {one}"


def _commands_of_page(text: str) -> Iterator[str]:
    """In code: whatever follows `kvmsec`, and a span that begins with a noun and a verb."""
    blocks = [body for body in _FENCED.findall(text) if "import " not in body]
    prose = _FENCED.sub("", text)
    blocks += [line for line in prose.splitlines() if line.startswith("    ")]
    for chunk in blocks:
        for line in chunk.splitlines():
            yield from re.findall(rf"(?<![\w/.-])kvmsec (?=--|{_NOUN})(.*?)(?=\bkvmsec |$)", line)
    for span in _SPAN.findall(prose):
        if begun := re.match(rf"(?:kvmsec (?=--|[a-z])|(?={_NOUN} (?:--)?[a-z]))(.*)", span):
            yield begun[1]


def _commands_of_source(text: str) -> Iterator[str]:
    """In every string: hints, most of them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            whole = "".join(
                str(part.value) if isinstance(part, ast.Constant) else _FILLED_IN
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            whole = node.value
        else:
            continue
        yield from re.findall(rf"\bkvmsec ({_NOUN} .*?)(?=\bkvmsec |$)", whole)


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_named_exists(path: Path) -> None:
    commands = (_commands_of_source if path.suffix == ".py" else _commands_of_page)(
        path.read_text()
    )

    assert {one: found for one in commands if (found := faults(one))} == {}


def test_the_commands_of_pages_and_code_are_found() -> None:
    assert len([one for page in PAGES for one in _commands_of_page(page.read_text())]) > 150
    assert len([one for path in SOURCES for one in _commands_of_source(path.read_text())]) > 100


@pytest.mark.parametrize(
    "command",
    [
        "cluster modfy --uid-pool POOL",
        "instance start web --accel xen",
        "instance list | infos NAME",
        "uids release 4711 4712",
        "node readd NAME --forced",
        "cluster renew-crypto --key-kind ed25519|p521",
    ],
)
def test_a_command_that_does_not_exist_is_a_fault(command: str) -> None:
    assert faults(command) != []


@pytest.mark.parametrize(
    "command",
    [
        "instance start web --disk /srv/web.img,format=raw --nic bridge=br0   # one of two",
        "cluster certless show | disable",
        "instance stop NAME [--force], or leave it",
        "node readd",
    ],
)
def test_a_command_that_exists_is_none(command: str) -> None:
    assert faults(command) == []

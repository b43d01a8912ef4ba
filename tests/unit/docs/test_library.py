"""What docs/library.md shows is Python, and every name in it exists."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsec.agent import Agent
from kvmsec.linux.errors import Fault

PAGE = Path(__file__).resolve().parents[3] / "docs/library.md"
_EXAMPLE = re.compile(r"^```python\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_ERROR_ROW = re.compile(r"^\| (?P<names>`(?:kvmsec|uidpool|firewall|hypervisor)\.[^|]+) \|", re.M)


def _examples() -> list[str]:
    return [example["body"] for example in _EXAMPLE.finditer(PAGE.read_text())]


def _imports(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def test_every_name_that_an_example_imports_is_there() -> None:
    found = [pair for source in _examples() for pair in _imports(source)]

    assert found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name)


def _errors() -> Iterator[str]:
    """`a.b.C`, `D`: the module of the first of a row holds for the others."""
    for row in _ERROR_ROW.finditer(PAGE.read_text()):
        module = ""
        for name in re.findall(r"`([\w.]+)`", row["names"]):
            module = name.rpartition(".")[0] or module
            yield f"{module}.{name.rpartition('.')[2]}"


@pytest.mark.parametrize("error", list(_errors()))
def test_every_error_that_is_named_is_there_and_a_fault(error: str) -> None:
    module, _, name = error.rpartition(".")

    assert issubclass(getattr(importlib.import_module(module), name), Fault)


def test_every_call_of_an_agent_is_told() -> None:
    calls = [name for name in vars(Agent) if not name.startswith("_")]
    text = PAGE.read_text()

    assert [name for name in calls if not re.search(rf"\b{name}\(", text)] == []

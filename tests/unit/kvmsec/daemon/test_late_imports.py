"""What a confined process imports within its functions must be there before it is shut in."""

import subprocess
import sys

import pytest

# Prints every import that stands in a function of our own modules and was not made by then.
LOOK = """
import ast, importlib, sys
from kvmsec.daemon.confined_life import import_all

program, *modules = sys.argv[1:]
importlib.import_module(program)
if modules:
    import_all(*modules)
loaded = dict(sys.modules)
for name, module in sorted(loaded.items()):
    if name.partition(".")[0] not in ("kvmsec", "hypervisor", "uidpool", "firewall"):
        continue
    path = getattr(module, "__file__", None)
    if path is None:
        continue
    for function in ast.walk(ast.parse(open(path).read())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [node.module]
            for late in named:
                if late not in loaded:
                    print(f"{name}.{function.name} imports {late}")
"""


def late(program: str, *modules: str) -> list[str]:
    argv = [sys.executable, "-c", LOOK, program, *modules]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("kvmsec.daemon.front", "kvmsec.rpc.server"),
        ("kvmsec.daemon.courier_life", "kvmsec.rpc.courier"),
    ],
)
def test_nothing_of_ours_is_left_to_import(program: str, module: str) -> None:
    assert late(program, module) == []


def test_what_is_left_to_import_is_seen() -> None:
    assert any("kvmsec.pki.contexts" in line for line in late("kvmsec.daemon.front"))

"""Who may import whom, and which third-party package belongs to which room."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("uidpool", "firewall", "hypervisor", "kvmsec")

# A package that is not named here may be imported by nobody.
THIRD_PARTY = {
    "attrs": ROOMS,
    "attr": ROOMS,
    "msgspec": ROOMS,
    "cattrs": ROOMS,
    "psutil": ("uidpool", "hypervisor", "kvmsec.audit"),
    "iptc": ("firewall.iptables",),
    "qemu": ("hypervisor.monitor",),
    "cryptography": ("kvmsec.pki",),
    "click": ("kvmsec.cli",),
    "rich": ("kvmsec.cli",),
    "aiohttp": ("kvmsec.rpc",),
    "pyroute2": ("kvmsec.node.taps",),
}

# Room -> what of our own it may not import, however deep.
FORBIDDEN = {
    "kvmsec.linux": (*ROOMS[:3], "kvmsec"),
    "kvmsec.cluster": ("hypervisor", "firewall", "kvmsec.node", "kvmsec.cli"),
    "kvmsec.rpc": ("kvmsec.node", "kvmsec.cli"),
    "kvmsec.model": ("kvmsec.node", "kvmsec.cli", "kvmsec.cluster", "kvmsec.store"),
}


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield _module_of(path), ast.parse(path.read_text(), str(path))


def _imports_of(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from kvmsec import linux` imports kvmsec.linux.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def _violations(module: str, tree: ast.Module) -> Iterator[str]:
    top = module.partition(".")[0]
    for name in _imports_of(module, tree):
        first = name.partition(".")[0]
        if first in ROOMS:
            if reason := _own_violation(module, top, name):
                yield f"{module} imports {name}: {reason}"
        elif first not in sys.stdlib_module_names:
            allowed = THIRD_PARTY.get(first, ())
            if not any(_is_in(module, room) for room in allowed):
                yield f"{module} imports {first}, which belongs to {allowed or 'nobody'}"


def _own_violation(module: str, top: str, name: str) -> str | None:
    if top != "kvmsec" and not _is_in(name, top) and not _is_in(name, "kvmsec.linux"):
        return "the three rooms meet in kvmsec.node only, and see nothing but kvmsec.linux"
    for room, forbidden in FORBIDDEN.items():
        if _is_in(module, room) and not _is_in(name, room):
            for other in forbidden:
                if _is_in(name, other):
                    return f"{room} may not see {other}"
    if _is_in(name, "kvmsec.cli") and not _is_in(module, "kvmsec.cli"):
        return "nobody imports the command line"
    return None


def test_every_import_is_one_that_the_rooms_allow() -> None:
    violations = [line for module, tree in _modules() for line in _violations(module, tree)]

    assert violations == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("uidpool.claims", "import firewall.policy"),
        ("uidpool.claims", "from kvmsec import config"),
        ("firewall.policy", "import iptc"),
        ("hypervisor.jail", "import click"),
        ("kvmsec.linux.files", "import kvmsec.paths"),
        ("kvmsec.linux.files", "import attr, numpy"),
        ("kvmsec.cluster", "from kvmsec.node import local"),
        ("kvmsec.node.local", "from kvmsec.cli import main"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert list(_violations(module, ast.parse(source)))


def test_no_room_works_at_import() -> None:
    """Only definitions stand at the top level: no call that does something."""
    allowed_calls = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If)
    allowed = (*allowed_calls, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    offenders = [
        f"{module}:{node.lineno}"
        for module, tree in _modules()
        for node in tree.body
        if not isinstance(node, allowed)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]

    assert offenders == []

"""Who may import whom, and which third-party package belongs to which room."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
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
    "kvmsec.audit": ("uidpool", "kvmsec.node", "kvmsec.cli", "kvmsec.cluster", "kvmsec.store"),
    "kvmsec.model": ("kvmsec.node", "kvmsec.cli", "kvmsec.cluster", "kvmsec.store"),
}


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple((_module_of(path), ast.parse(path.read_text(), str(path))) for path in paths)


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
        ("kvmsec.audit.reading", "from kvmsec.node import records"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert list(_violations(module, ast.parse(source)))


# What an import may call besides the constructors of our own frozen classes: each makes a value
# out of the values that it is given, and asks the system nothing.
PURE = {
    *("dict.fromkeys", "frozenset", "range", "sorted", "tuple"),
    *("Path", "PurePosixPath", "TypeVar", "datetime", "logging.Logger", "re.compile"),
    *("signal.valid_signals", "struct.Struct", "attrs.fields_dict", "msgspec.Meta"),
    *("len", "timedelta"),
    *("define", "field", "frozen"),
    # Our own: the makers of validators, of the tables of foreign ranges and of calls, and of a
    # constant answer.
    *("_at_most", "_between", "_calls", "_matches", "_one_of", "_rule", "_foreign", "UidRanges.of"),
    *("rules.list_of", "rules.one_of", "rules.seconds", "rules.whole_number", "warning"),
    *("_converter", "reach.namespace"),
}
PURE_IN = {
    "kvmsec.linux": {"ctypes.CDLL"},
    "kvmsec.cli": {
        *("click.Choice", "click.argument", "click.group", "click.make_pass_decorator"),
        *("click.option", "click.version_option", "instance.command", "uids.command", "_Parsed"),
        "click.command",
    },
}
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If)


def _run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What of these statements an import evaluates: not what stands inside functions."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from node.decorator_list
                yield from (*node.args.defaults, *filter(None, node.args.kw_defaults))
            case ast.ClassDef():
                yield from (*node.decorator_list, *node.bases, *node.keywords)
                yield from _run_at_import(node.body)
            case ast.If():
                yield node.test
                yield from _run_at_import([*node.body, *node.orelse])
            case _:
                yield node


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


def _is_frozen(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return any(ast.unparse(one).split("(")[0] == "frozen" for one in decorators)


def _frozen_classes() -> set[str]:
    nodes = (node for _, tree in _modules() for node in ast.walk(tree))
    return {node.name for node in nodes if isinstance(node, ast.ClassDef) and _is_frozen(node)}


def _work_at_import(module: str, tree: ast.Module, frozen: set[str]) -> Iterator[str]:
    allowed = PURE | frozen
    allowed |= {name for room, names in PURE_IN.items() if _is_in(module, room) for name in names}
    for node in _run_at_import(tree.body):
        is_bare = isinstance(node, ast.stmt) and not isinstance(node, DEFINITIONS)
        if is_bare and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield f"{module}:{node.lineno} {ast.unparse(node)}"
        for call in _calls(node):
            if ast.unparse(call.func) not in allowed:
                yield f"{module}:{call.lineno} calls {ast.unparse(call.func)}"


def test_no_room_works_at_import() -> None:
    """Only definitions stand outside functions, and values that are made of other values."""
    frozen = _frozen_classes()
    works = [line for module, tree in _modules() for line in _work_at_import(module, tree, frozen)]

    assert works == []


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['true'])",
        "HOME = Path('/root').exists()",
        "HOSTNAME: Final = socket.gethostname()",
        "class Here:\n    place = os.getcwd()",
        "def here(place=os.getcwd()): ...",
        "if os.geteuid() == 0:\n    ROOT = True",
        "LIBC = ctypes.CDLL(None)",
        "for each in range(3): ...",
        "with Path('/x') as x: ...",
        "@register()\ndef here(): ...",
    ],
)
def test_work_at_import_is_seen(source: str) -> None:
    assert list(_work_at_import("uidpool.claims", ast.parse(source), set()))


# Prints what the system is asked while each module is imported; what libraries do at their own
# import, and Python to find and read a module, doesn't count.
WATCH = """
import importlib, sys, warnings
import aiohttp.web
import asyncio, cattrs, click, cryptography, msgspec, psutil, pyroute2, qemu.qmp, rich.console

of_an_import = ("import", "exec", "compile", "marshal.", "object.", "code.__new__", "sys._",
                "builtins.id", "ctypes.dl", "os.listdir", "os.scandir")
current = None

def watch(event, arguments):
    source = event == "open" and str(arguments[0]).endswith((".py", ".pyc"))
    if current and not source and not event.startswith(of_an_import):
        print(current, event, arguments)

sys.addaudithook(watch)
for current in sys.argv[1:]:
    importlib.import_module(current)
current = None
"""


def watched(modules: Iterable[str], path: Path = ROOT) -> str:
    # -B: in a fresh checkout Python would write its bytecode.
    argv = [sys.executable, "-B", "-c", WATCH, *modules]
    done = subprocess.run(argv, cwd=path, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_an_import_asks_the_system_nothing() -> None:
    """No file, process, socket or variable: an import has the same outcome wherever it is done."""
    assert watched(module for module, _ in _modules()) == ""


def test_what_an_import_asks_is_seen(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text("import os\nopen('/etc/hostname').close()\n")
    assert "asking open ('/etc/hostname'" in watched(["asking"], tmp_path)


def loaded(statement: str) -> set[str]:
    """What a new Python has loaded of ours, and of others' packages, after the statement."""
    program = (
        f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    )
    argv = [sys.executable, "-I", "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    names = set(done.stdout.split())
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def test_the_package_alone_loads_nothing() -> None:
    assert loaded("import kvmsec") == {"kvmsec"}


def test_a_name_of_the_package_loads_no_more_than_it_needs() -> None:
    told = loaded("from kvmsec import InstanceState, definition_from")
    others = {name.partition(".")[0] for name in told}
    assert others.isdisjoint({"click", "rich", "iptc", "pyroute2", "qemu", "psutil", "firewall"})
    assert not [name for name in told if _is_in(name, "kvmsec.node") or _is_in(name, "kvmsec.cli")]


def test_the_command_line_loads_no_node_before_it_is_asked_for_one() -> None:
    told = loaded("import kvmsec.cli.main")
    assert not [name for name in told if _is_in(name, "kvmsec.node")]

"""The sandbox that every privileged test runs in, and what makes a missing piece a failure.

A pytest that is started as root executes itself again in mount, network, IPC, UTS and PID
namespaces of its own. Users, rules, interfaces, mounts and processes that a test makes live there
and end with it, even when the test run is killed.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

_INSIDE = "KVMSEC_TEST_SANDBOX"
_PRIVATE = ("/run", "/var/lib", "/var/log", "/tmp", "/var/tmp", "/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="store_true",
        help="fail, instead of skipping, where root, QEMU or netfilter is missing",
    )


def pytest_cmdline_main(config: pytest.Config) -> None:
    if os.geteuid() != 0 or config.option.help:
        return
    if os.environ.get(_INSIDE) != str(os.getppid()) and os.environ.get(_INSIDE) != "entered":
        _execute_inside(config)
    elif os.environ[_INSIDE] != "entered":
        _furnish()
        os.environ[_INSIDE] = "entered"


def _execute_inside(config: pytest.Config) -> None:
    namespaces = ("--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--mount-proc")
    python = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    # The shell is the namespace's init: it takes the zombies of orphans, as an init does.
    as_init = ["sh", "-c", '"$@"; exit $?', "sh"]
    os.environ[_INSIDE] = "1"
    sys.stdout.flush()
    os.execvp("unshare", ["unshare", *namespaces, "--kill-child", "--", *as_init, *python])


def _furnish() -> None:
    """Make the changeable parts of the host private: a copy of /etc, empty places for the rest."""
    from kvmsec.linux import command

    def run(*argv: str) -> None:
        command.run(argv, timeout_s=30)

    copy = Path("/mnt")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "etc", str(copy))
    shutil.copytree("/etc", copy, symlinks=True, dirs_exist_ok=True)
    run("mount", "--move", str(copy), "/etc")
    for place in _PRIVATE:
        if Path(place).is_dir():
            mode = "1777" if "tmp" in place or "shm" in place else "755"
            run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "private", place)
    Path("/run/lock").mkdir(mode=0o1777)
    Path("/run/lock").chmod(0o1777)
    run("ip", "link", "set", "lo", "up")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _missing()
    for item in items:
        for mark in ("kvm", "root"):
            if item.get_closest_marker(mark) and missing.get(mark):
                _refuse(item, f"needs {missing[mark]}", required=config.option.require)


def _missing() -> dict[str, str]:
    if os.geteuid() != 0:
        return {"root": "root", "kvm": "root"}
    return {} if shutil.which("qemu-system-x86_64") else {"kvm": "qemu-system-x86_64"}


def _refuse(item: pytest.Item, reason: str, *, required: bool) -> None:
    if required:
        item.add_marker(pytest.mark.usefixtures("_missing_is_a_failure"))
    else:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def _missing_is_a_failure() -> None:
    pytest.fail("something that this test needs is missing: see ./dev setup")

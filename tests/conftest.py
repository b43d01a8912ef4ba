"""The sandbox that every privileged test runs in, and what makes a missing piece a failure.

A pytest that is started as root executes itself again in mount, network, IPC, UTS and PID
namespaces of its own. Users, rules, interfaces, mounts and processes that a test makes live there
and end with it, even when the test run is killed.
"""

import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import pytest

# A machine that is busy with something else is slow, and no example is wrong for that.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

_INSIDE = "KVMSEC_TEST_SANDBOX"
_CHECKOUT = Path(__file__).resolve().parents[1]
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
    # Ignored, as in a background job, it would stay so for every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execvp("unshare", ["unshare", *namespaces, "--kill-child", "--", *as_init, *python])


def _furnish() -> None:
    """Make the changeable parts of the host private: a copy of /etc, empty places for the rest."""
    # Imported before anything is hidden.
    from kvmsec.linux import command, namespaces

    def bind(source: str, target: str) -> None:
        namespaces.mount(source, target, None, namespaces.MS_BIND)

    def run(*argv: str) -> None:
        command.run(argv, timeout_s=30)

    kept = {path: os.open(path, os.O_PATH) for path in (_CHECKOUT, Path(sys.prefix))}
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
    for path, descriptor in kept.items():
        _show_again(path, descriptor, bind)


def _show_again(path: Path, descriptor: int, bind: Callable[[str, str], None]) -> None:
    """Bring back a directory that a private place has hidden, as in a clone below /tmp."""
    if not path.exists():
        path.mkdir(parents=True)
        bind(f"/proc/self/fd/{descriptor}", str(path))
    os.close(descriptor)
    if path == _CHECKOUT:
        os.chdir(path)


_NETFILTER = ("nft", "iptables-legacy", "ip6tables-legacy", "ip")
_PROGRAMS = {
    "root": (),
    "netfilter": _NETFILTER,
    "kvm": ("qemu-system-x86_64", "qemu-img", *_NETFILTER),
}

# How a skip begins that no package could spare: the same behaviour is proved another way there.
_BEYOND_PACKAGES = ("this kernel ", "this machine's /dev/kvm ")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in filter(item.get_closest_marker, _PROGRAMS):
        if missing := _missing(mark):
            pytest.skip(f"needs {missing}")


@functools.cache
def _missing(mark: str) -> str:
    """What a test with this mark lacks here."""
    programs = [name for name in _PROGRAMS[mark] if shutil.which(name) is None]
    return ", ".join([*(["root"] if os.geteuid() else []), *programs])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under --require, a test that skips itself has failed."""
    report = yield
    if item.config.option.require and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(_BEYOND_PACKAGES):
            report.outcome = "failed"
            report.longrepr = f"{reason}: what is missing comes with ./dev setup"
    return report

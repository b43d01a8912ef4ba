"""A kvmsec of the test's own: a root of files, a pool of real users, and guests that really run.

Whatever a test does, its host must look as before when its `lab` ends.
"""

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny
from kvmsec.linux import command
from tests.kvm.census import census
from tests.kvm.lab import DOMAIN, DOMAIN_UID, POOL, Lab
from uidpool import provision
from uidpool.snapshot import Snapshot

KVM_BOOT_DEADLINE_S = 5.0

_ACCELERATOR = pytest.StashKey[str]()


# What the guest runs on ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def accelerator_in_use(request: pytest.FixtureRequest) -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`; the summary says which."""
    chosen = "kvm" if _kvm_runs_the_guest() else "tcg"
    request.config.stash[_ACCELERATOR] = chosen
    return chosen


def _kvm_runs_the_guest() -> bool:
    machine = ["-M", "pc", "-accel", "kvm", "-m", "1", "-bios", str(tiny.rom_path())]
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", *machine, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with qemu:
        try:
            return _says(qemu, tiny.BANNER, KVM_BOOT_DEADLINE_S)
        finally:
            qemu.kill()


def _says(qemu: subprocess.Popen[bytes], words: bytes, within_s: float) -> bool:
    assert qemu.stdout is not None
    heard, end = b"", time.monotonic() + within_s
    while words not in heard:
        if not select.select([qemu.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        chunk = os.read(qemu.stdout.fileno(), 4096)
        if not chunk:
            return False
        heard += chunk
    return True


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash.get(_ACCELERATOR, "kvm") == "tcg":
        terminalreporter.section("accelerator")
        terminalreporter.line(
            "The tiny guest did not boot under /dev/kvm: the tests of instances ran under TCG."
        )


# Roots of a test's own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool_users() -> Iterator[None]:
    """The users of every test's pool, and the one that owns instances under `user`."""
    accounts = [Path("/etc", name) for name in ("passwd", "group", "shadow", "gshadow")]
    before = {path: path.read_bytes() for path in accounts}
    provision.apply(provision.plan(POOL, Snapshot.read()))
    line = f'u {DOMAIN} {DOMAIN_UID} "keeps guests" / /usr/sbin/nologin\n'
    command.run(["systemd-sysusers", "-"], input=line.encode(), timeout_s=30)
    yield
    for path, content in before.items():
        path.write_bytes(content)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was found out about QEMU: asked once for all roots."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def make_lab(pool_users: None, accelerator_in_use: str, features: Path) -> Iterator[Any]:
    """Makes roots, each with a cluster that has the pool; the host is as before afterwards."""
    # Imported here, it is not by each of the processes that are forked off.
    import pyroute2  # noqa: F401

    before, labs = census(), []

    def make(config: str = "", **options: Any) -> Lab:
        # Its name is this run's alone: control groups are shared with other sandboxes.
        lab = Lab(Path(tempfile.mkdtemp(prefix="kvmsec-", dir="/run")), accelerator_in_use)
        labs.append(lab)
        lab.paths.make_directories()
        if config:
            lab.configure(config)
        shutil.copytree(features, lab.paths.features, dirs_exist_ok=True)
        lab.init(**options)
        return lab

    yield make
    left = {str(lab.root): found for lab in labs if (found := lab.leftovers())}
    with contextlib.ExitStack() as ends:  # Each is called, whatever another raises.
        for lab in labs:
            ends.callback(lab.remove)
            shutil.copytree(lab.paths.features, features, dirs_exist_ok=True)
        for lab in labs:
            ends.callback(lab.close)
    assert not left
    assert census() == before


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()

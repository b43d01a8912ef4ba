"""A kvmsec of the test's own: a root of files, a pool of real users, and guests that really run.

Whatever a test does, its host must look as before when its `lab` ends.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.accelerator import accelerator
from tests.kvm.lab import Lab, labs, users
from tests.kvm.libvirt_programs import IS_INSTALLED

# Not a skip, which --require takes for a failure: libvirt is no part of what ./dev setup installs.
collect_ignore = [] if IS_INSTALLED else ["test_audit_libvirt.py"]

_ACCELERATOR = pytest.StashKey[str]()


# What the guest runs on ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def accelerator_in_use(request: pytest.FixtureRequest) -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`; the summary says which."""
    chosen = accelerator()
    request.config.stash[_ACCELERATOR] = chosen
    return chosen


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
    with users():
        yield


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was found out about QEMU: asked once for all roots."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def make_lab(pool_users: None, accelerator_in_use: str, features: Path) -> Iterator[Any]:
    """Makes roots, each with a cluster that has the pool; the host is as before afterwards."""
    with labs(accelerator_in_use, features) as make:
        yield make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()

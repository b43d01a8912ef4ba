"""A cluster of five nodes that all scenarios share; what it is made of is in lab/.

A scenario leaves the cluster as it should be, which `cluster verify` says at its end; after one
that failed every node is booted anew with the disk that it had at first.
"""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.lab.formation import Formation, instances_ended
from tests.cluster.lab.lab import new_lab
from tests.kvm.accelerator import accelerator

_HERE = Path(__file__).parent
_HAS_FAILED = pytest.StashKey[bool]()
_FORMED = pytest.StashKey[tuple[Formation, ExitStack]]()


@pytest.fixture(scope="session")
def accelerator_in_use() -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`."""
    return accelerator()


@pytest.fixture
def formation(request: pytest.FixtureRequest, accelerator_in_use: str) -> Formation:
    """The cluster, formed when the first scenario asks for it."""
    stash = request.session.stash
    if _FORMED not in stash:
        with ExitStack() as undo:
            made = Formation(undo.enter_context(new_lab(5)), accelerator_in_use)
            made.form()
            made.keep()
            stash[_FORMED] = made, undo.pop_all()
    return stash[_FORMED][0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """End the nodes after the last scenario: other tests want no child of theirs left."""
    try:
        yield
    finally:
        if _FORMED in item.session.stash and (
            nextitem is None or _HERE not in nextitem.path.parents
        ):
            item.session.stash[_FORMED][1].close()
            del item.session.stash[_FORMED]


@pytest.fixture
def cluster(formation: Formation, request: pytest.FixtureRequest) -> Iterator[Formation]:
    """Five nodes: node1 is the master, the others are plain; no instance runs."""
    try:
        with instances_ended(formation):
            yield formation
        if not request.node.stash.get(_HAS_FAILED, False):
            formation.require_sound()
    except BaseException:
        request.node.stash[_HAS_FAILED] = True
        raise
    finally:
        if request.node.stash.get(_HAS_FAILED, False):
            formation.restore()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_HAS_FAILED] = True
    return report

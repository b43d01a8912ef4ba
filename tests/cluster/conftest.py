"""A cluster of five nodes that all scenarios share; what it is made of is in lab/.

A scenario leaves the cluster as it should be, which `cluster verify` says at its end; after one
that failed every node is booted anew with the disk that it had at first.
"""

from collections.abc import Generator, Iterator

import pytest

from tests.cluster.lab.formation import Formation, instances_ended
from tests.cluster.lab.lab import new_lab
from tests.kvm.accelerator import accelerator

_HAS_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def accelerator_in_use() -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`."""
    return accelerator()


@pytest.fixture(scope="session")
def formation(accelerator_in_use: str) -> Iterator[Formation]:
    with new_lab(5) as lab:
        made = Formation(lab, accelerator_in_use)
        made.form()
        made.keep()
        yield made


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

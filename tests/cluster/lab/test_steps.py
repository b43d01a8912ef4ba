"""That a command dies at the step that a test names, and at no other."""

import signal
from collections.abc import Iterator

import pytest

from tests.cluster.lab.lab import Lab, new_lab
from tests.cluster.lab.steps import dying_at, steps_of

pytestmark = pytest.mark.kvm

INIT = ("cluster", "init", "--name", "lab", "--uid-pool", "246000-246009")


@pytest.fixture(scope="module")
def alone() -> Iterator[Lab]:
    with new_lab(1) as made:
        made.first.kvmsec("uids", "provision", "246000-246009")
        yield made


def test_a_command_dies_before_the_step_that_is_named(alone: Lab) -> None:
    node = alone.first
    died = dying_at(node, "rename cluster.json", *INIT)
    assert died.status == -signal.SIGKILL
    node.kvmsec("cluster", "info", status=1)
    done = dying_at(node, "a step that it does not have", *INIT)
    assert done.status == 0
    node.kvmsec("cluster", "destroy", "--yes")


def test_the_steps_of_a_command_are_told_in_their_order(alone: Lab) -> None:
    node = alone.first
    assert "rename cluster.json" in steps_of(node, *INIT)
    assert "remove cluster.json" in steps_of(node, "cluster", "destroy", "--yes")

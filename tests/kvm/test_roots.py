"""Two roots of kvmsec on one host share what is the kernel's, and touch nothing of each other's."""

import asyncio
import os
import signal
from typing import Any

import pytest

from kvmsec.agent import InstanceState
from uidpool.errors import PoolExhausted
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

SHARED = UidRanges.parse("245000-245005")


@pytest.fixture
def roots(make_lab: Any) -> tuple[Any, Any]:
    return make_lab(uid_pool=SHARED), make_lab(uid_pool=SHARED)


def test_two_roots_never_draw_one_uid_twice_and_an_exhausted_pool_counts_both(roots):
    first, second = roots
    rivals = [
        root.rival(lambda node, root=root: start_three(node, root))
        for root in roots
    ]  # fmt: skip
    assert [rival.outcome() for rival in rivals] == [{"value": None}] * 2
    # The same names in both: an instance is its root's.
    held = [one.uid for root in roots for one in root.instances().values()]
    assert sorted(held) == [*SHARED]
    for root in roots:
        with pytest.raises(PoolExhausted) as caught:
            root.start("onemore")
        assert (caught.value.size, caught.value.leased) == (6, 6)
        assert len(root.leases()) == 3
        root.reconcile()
    assert {one.state for root in roots for one in root.instances().values()} == {
        InstanceState.RUNNING
    }
    uid = first.instances()["vm0"].uid
    first.stop("vm0")
    states = {one.uid: one.state for one in second.run(lambda node: node.uid_states())}
    assert states[uid] == "resting", "a rest counts for all"
    for root in roots:
        for name in root.instances():
            root.stop(name)


async def start_three(node: Any, root: Any) -> None:
    await asyncio.gather(*(node.start(root.definition(f"vm{number}")) for number in range(3)))


def test_a_root_that_ends_or_puts_right_leaves_the_other_as_it_is(roots):
    first, second = roots
    assert first.paths.tag != second.paths.tag
    theirs = second.start()
    launcher = first.rival(lambda node: node.start(first.definition()))
    assert "error" not in launcher.outcome()
    launcher = first.rival(lambda node: node.start(first.definition("died")), on_step=die_at_ready)
    assert launcher.outcome() is None
    assert second.reconcile() == (), "what another root left is that root's to put right"
    assert len(first.leases()) == 2
    assert len(first.reconcile()) == 1
    first.stop()
    assert not first.leases() and not first.groups() and not first.instances()
    first.run(lambda node: node.remove_rules())
    assert (first.rules(), second.rules()) == ("", str(SHARED))
    first.destroy()
    assert second.instances()["web"].pid == theirs.pid
    assert {one.severity for one in second.run(lambda node: node.verify_rules())} == {"ok"}
    with second.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    second.stop()
    assert second.rules() == str(SHARED)


def die_at_ready(step: str) -> None:
    if step == "ready":
        os.kill(os.getpid(), signal.SIGKILL)

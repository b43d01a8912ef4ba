"""Who ends an instance is raced by others, while the instance forks as fast as it can."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from kvmsec.agent import InstanceState
from kvmsec.linux.locks import FileLock
from tests.attacks.attacker import Instance, program
from tests.kvm.accelerator import accelerator
from tests.kvm.lab import labs, users
from uidpool import usage
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

TWO_UIDS: Final = UidRanges.parse("245000-245001")
WITHOUT_REST: Final = "[uids]\nreuse_delay_s = 0\n"
ROUNDS: Final = 5
APART_S: Final = 0.01


@pytest.fixture
def lab(features: Path) -> Iterator[Any]:
    with users(), labs(accelerator(), features) as make:
        yield make(WITHOUT_REST, uid_pool=TWO_UIDS)


@pytest.fixture
def forking(lab: Any) -> Iterator[Any]:
    """Starts an instance that forks on, and gives what is known of it while it is told to."""
    qemu = Path("/var/lib/hostile")  # Where nobody else may change it.
    qemu.write_bytes(program().read_bytes())
    qemu.chmod(0o755)

    @contextmanager
    def started() -> Iterator[Any]:
        info = lab.start(qemu=str(qemu))
        with Instance(lab.paths.instance("web").serial_socket) as inside:
            assert inside.order("fork-on").is_ready
            yield info

    yield started
    qemu.unlink()


def what_is_left(lab: Any, uid: int) -> list[str]:
    used = usage.inspect(uid)
    return [*([] if used.is_clean else [used.reason()]), *map(str, lab.leases()), *lab.leftovers()]


def test_a_stop_that_others_reconcile_against_ends_all_of_it(lab: Any, forking: Any) -> None:
    async def reconcile_often(node: Any) -> list[str]:
        return [line for _ in range(20) for line in await node.reconcile()]

    for number in range(ROUNDS):
        with forking() as info:
            others = [lab.rival(reconcile_often) for _ in range(2)]
            others[0].ends_within(number * APART_S)
            lab.stop()
            done = [other.outcome()["value"] for other in others]
            assert done == [[], []], "nobody else takes back what is being stopped"
        assert what_is_left(lab, info.uid) == []


def test_a_stop_that_is_killed_is_finished_by_whoever_comes_next(lab: Any, forking: Any) -> None:
    for number in range(ROUNDS):
        with forking() as info:
            stopper = lab.rival(lambda node: node.stop("web", force=True))
            stopper.ends_within(number * APART_S)
            stopper.kill()
            stopper.outcome()
            # A child that it had just forked holds the lock for some milliseconds more, and
            # reconcile leaves alone what somebody works on.
            with FileLock(lab.paths.instance_lock("web")):
                pass
            said = lab.reconcile()
            if lab.instances():  # It had not come to the first thing that it does.
                assert lab.instances()["web"].state is InstanceState.RUNNING, said
                lab.stop()
        assert what_is_left(lab, info.uid) == []


def test_a_stop_and_a_start_at_once_leave_nothing_of_the_first(lab: Any, forking: Any) -> None:
    for number in range(ROUNDS):
        with forking() as info:
            stopper = lab.rival(lambda node: node.stop("web", force=True))
            stopper.ends_within(number * APART_S)
            starter = lab.rival(lambda node: node.start(lab.definition()))
            assert "error" not in stopper.outcome()
            started = starter.outcome()
            assert started.get("error", "AlreadyRunning") == "AlreadyRunning"
            seen = lab.instances()
            assert len(lab.leases()) == len(seen)
            if seen:
                assert seen["web"].state is InstanceState.RUNNING
                assert [one.pid for one in usage.inspect(seen["web"].uid).processes] == [
                    seen["web"].pid
                ], "what the first one forked is gone, whoever has its uid"
                lab.stop()
        assert what_is_left(lab, info.uid) == []

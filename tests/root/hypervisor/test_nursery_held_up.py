"""A nursery or a spare that somebody stops holds nobody up for ever, and leaves nothing."""

import os
import signal
import time

import pytest

from hypervisor import newborn
from hypervisor import nursery as nursery_module
from hypervisor.errors import JailFailed
from hypervisor.nursery import Nursery
from kvmsec.linux import syscalls
from tests.root.hypervisor.jailed import (
    Build,
    asked,
    born,
    children_of,
    execute,
    kill,
    nursery_pid,
    spares_of,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


def test_who_waits_for_a_child_whose_spare_is_stopped_is_not_held_up(
    nursery: Nursery, build: Build
) -> None:
    with born(nursery, build(), "/bin/sleep", "60") as child:
        (spare,) = spares_of(nursery)
        os.kill(spare, signal.SIGSTOP)
        child.release()
        wait_until(lambda: _program_of(child.process.pid) == "sleep")
        assert not child.has_said_all()  # The spare has what that comes over.
        kill(spare)
        wait_until(child.has_said_all)
        child.executed()


def test_a_nursery_that_takes_no_orders_is_replaced(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery_module, "_TAKEN_S", 0.1)
    monkeypatch.setattr(newborn, "_BIRTH_S", 0)
    nursery.begin()
    (spare,) = wait_for_spare(nursery)
    os.kill(spare, signal.SIGSTOP)
    with pytest.raises(JailFailed, match="takes no orders; the next start makes another"):
        for _ in range(5000):
            nursery.birth().close()
    with born(nursery, build(), "/bin/true") as child:
        execute(child)


def test_a_spare_that_its_nursery_could_not_wait_for_is_not_left(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_with_parent = syscalls.end_with_parent

    def hesitate() -> None:
        time.sleep(0.1)
        end_with_parent()

    monkeypatch.setattr(syscalls, "end_with_parent", hesitate)
    nursery.begin()
    pid = nursery_pid(nursery)
    wait_until(lambda: len(children_of(os.getpid())) == 2)
    assert not spares_of(nursery)  # It has not said yet that it is there.
    os.kill(pid, signal.SIGKILL)
    nursery.close()
    assert not children_of(os.getpid())


def test_nobody_is_born_to_a_launcher_that_waits_no_more(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    nursery.begin()
    (spare,) = wait_for_spare(nursery)
    os.kill(spare, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(newborn, "_BIRTH_S", 0)
        asked(nursery, build()).close()
    os.kill(spare, signal.SIGCONT)
    with born(nursery, build(), "/bin/true") as child:
        execute(child)


def _program_of(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as comm:
        return comm.read().strip()

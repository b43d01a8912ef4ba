"""The namespaces that a spare makes ahead of a birth: each is one child's alone."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from hypervisor import jail as jails
from hypervisor.errors import JailFailed
from hypervisor.jail import NETWORK_NAMESPACE, kinds_made_before
from hypervisor.nursery import Nursery
from kvmsec.linux import syscalls
from tests.root.hypervisor.jailed import (
    Build,
    asked,
    born,
    end,
    execute,
    heard,
    kill_spares,
    nursery_pid,
    spares_of,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

Rooms = dict[str, str]


def rooms_of(pid: int | str) -> Rooms:
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "ipc", "uts")}


def wait_for_prepared(nursery: Nursery) -> Rooms:
    """Those that the next child is born in: its spare has made them."""
    own = rooms_of("self")
    spare = wait_for_spare(nursery)[-1]
    wait_until(lambda: not own.items() & rooms_of(spare).items())
    return rooms_of(spare)


def wait_for_end(pid: int) -> None:
    """Its exit status is left for the launcher."""
    wait_until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None)


def test_a_child_has_what_was_made_ahead_and_has_it_alone(nursery: Nursery, build: Build) -> None:
    nursery.begin()
    made = wait_for_prepared(nursery)
    with born(nursery, build(), "/bin/sleep", "60") as child:
        assert rooms_of(child.process.pid) == made
        assert not made.items() & rooms_of(nursery_pid(nursery)).items()
        execute(child)
        child.leave_origin()
        wait_until(lambda: spares_of(nursery) == [])
        assert rooms_of(child.process.pid) == made


def test_no_two_share_any_whether_made_ahead_or_not(nursery: Nursery) -> None:
    children = []
    try:
        for is_prepared in (True, False, True, True, False, False):
            if is_prepared:
                nursery.begin()
                nursery.prepare()
                nursery.prepare()
            children.append(heard(nursery.birth()))
        found = [room for one in children for room in rooms_of(one.process.pid).values()]
        assert len({*found, *rooms_of("self").values()}) == len(found) + 3
        assert rooms_of(nursery_pid(nursery)) == rooms_of("self")
    finally:
        for one in children:
            end(one)


def test_what_is_made_ahead_is_kept_until_somebody_is_born_in_it(nursery: Nursery) -> None:
    end(heard(nursery.birth()))
    nursery.prepare()
    made = wait_for_prepared(nursery)
    nursery.prepare()
    child = heard(nursery.birth())
    assert rooms_of(child.process.pid) == made
    end(child)


def test_a_spare_without_numbers_for_a_births_channels_is_told_and_the_nursery_goes_on(
    nursery: Nursery, build: Build
) -> None:
    nursery.begin()
    pid, (spare,) = nursery_pid(nursery), wait_for_spare(nursery)
    recvmsg = "47"  # linux/arch/x86/entry/syscalls/syscall_64.tbl
    wait_until(lambda: Path(f"/proc/{spare}/syscall").read_text().split()[0] == recvmsg)
    resource.prlimit(spare, resource.RLIMIT_NOFILE, (3, 3))
    with pytest.raises(JailFailed, match="the next start makes another"):
        heard(asked(nursery, build()))
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid


def test_a_nursery_without_any_ends_and_the_next_start_has_another(
    nursery: Nursery, build: Build
) -> None:
    nursery.begin()
    first = nursery_pid(nursery)
    kill_spares(nursery)
    resource.prlimit(first, resource.RLIMIT_NOFILE, (3, 3))
    with pytest.raises(JailFailed, match="the next start makes another"):
        heard(asked(nursery, build()))
    wait_for_end(first)
    nursery.prepare()
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) != first


def test_a_child_for_a_test_of_other_locks_keeps_the_network_alone(
    nursery: Nursery, build: Build
) -> None:
    nursery.begin()
    wait_for_prepared(nursery)
    jail = build(without_locks=frozenset({NETWORK_NAMESPACE}))
    child = heard(nursery.birth(None, jail.cell.kinds_made_before))
    try:
        kept = rooms_of("self").items() & rooms_of(child.process.pid).items()
        assert dict(kept).keys() == {"net"}
    finally:
        end(child)
    with born(nursery, build(), "/bin/sleep", "60") as another:
        execute(another)
        assert not rooms_of("self").items() & rooms_of(another.process.pid).items()


def test_to_prepare_without_a_nursery_begins_none_and_one_that_is_gone_is_no_error(
    nursery: Nursery,
) -> None:
    nursery.prepare()
    assert nursery._child is None
    nursery.begin()
    os.kill(nursery_pid(nursery), signal.SIGKILL)
    wait_for_end(nursery_pid(nursery))
    nursery.prepare()


def test_a_nursery_that_is_stopped_holds_up_nobody_who_prepares(nursery: Nursery) -> None:
    nursery.begin()
    stopped = (nursery_pid(nursery), *wait_for_spare(nursery))
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in range(5000):
        nursery.prepare()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    end(heard(nursery.birth()))


def test_namespaces_that_can_not_be_made_are_told_and_the_nursery_goes_on(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    is_allowed = tmp_path / "allowed"
    late_unshare = syscalls.unshare

    def unshare(flags: int) -> None:
        if flags == kinds_made_before() and not is_allowed.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        late_unshare(flags)

    monkeypatch.setattr(jails.syscalls, "unshare", unshare)
    nursery.begin()
    with pytest.raises(JailFailed) as raised:
        heard(asked(nursery, build()))
    assert (raised.value.step, raised.value.errno) == ("namespaces", errno.ENOSPC)
    assert "(network, IPC, UTS)" in raised.value.detail
    assert "user.max_*_namespaces" in str(raised.value.hint)
    pid = nursery_pid(nursery)
    nursery.prepare()
    wait_until(lambda: len(spares_of(nursery)) == 1)
    is_allowed.touch()  # The spare could not have them; the birth tries again.
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid

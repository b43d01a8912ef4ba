"""A spare, and the child that goes on where it was: whose end touches whom."""

import mmap
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor import child as child_side
from hypervisor import nursery as nursery_module
from hypervisor import process
from hypervisor.cgroups import Hierarchy
from hypervisor.errors import JailFailed
from hypervisor.jail import BootFile
from hypervisor.nursery import Nursery
from kvmsec.linux import forking, in_place, syscalls
from tests.root.hypervisor.jailed import (
    Build,
    asked,
    born,
    children_of,
    end,
    execute,
    heard,
    kill,
    kill_spares,
    nursery_pid,
    others_than,
    spares_of,
    status_of_end,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


def test_a_spare_that_is_killed_is_made_anew_for_who_asks(nursery: Nursery, build: Build) -> None:
    nursery.begin()
    kill_spares(nursery)
    with born(nursery, build(), "/bin/true") as child:
        execute(child)


def test_a_spare_that_nobody_needs_at_once_copies_its_pages_ahead(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery_module, "_LULL_S", 0.5)
    nursery.begin()
    (spare,) = wait_for_spare(nursery)
    shared_kib = _shared_kib(spare)
    most_kib = in_place.COPIED_BYTES >> 10
    assert shared_kib > 1024  # With nothing copied yet: it was forked just now.
    left_kib = max(shared_kib - most_kib, 0) + min(shared_kib, most_kib) / 10
    wait_until(lambda: _shared_kib(spare) < left_kib)


def test_a_spare_copies_nothing_while_starts_come_in_a_row(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = mmap.mmap(-1, 1)  # Shared with the nursery and all that come from it.

    def count() -> None:
        copies[0] += 1

    monkeypatch.setattr(nursery_module, "_LULL_S", 0.5)
    monkeypatch.setattr(in_place, "copy_shared_pages", count)
    for _ in range(3):
        with born(nursery, build(), "/bin/true") as child:
            execute(child)
        nursery.prepare()
    assert copies[0] == 0
    nursery.prepare()  # Said twice, as by starts that overlap.
    wait_until(lambda: copies[0] == 1)


def _shared_kib(pid: int) -> int:
    """What a fork left to be copied at the first touch (proc_pid_smaps(5))."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("Shared_Dirty:")[2].split()[0])


def test_a_birth_whose_spare_is_killed_is_told_and_the_nursery_goes_on(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_allowed = mmap.mmap(-1, 1)  # Shared with the nursery and all that come from it.
    late_birth = forking.become_sibling_init

    def be_born_or_killed(group: str | None) -> None:
        if not is_allowed[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        late_birth(group)

    monkeypatch.setattr(forking, "become_sibling_init", be_born_or_killed)
    with pytest.raises(JailFailed, match="is gone"):
        heard(asked(nursery, build()))
    pid = nursery_pid(nursery)
    is_allowed[0] = 1
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid


def test_a_child_that_is_killed_before_its_word_leaves_no_spare_and_the_nursery_goes_on(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_allowed = mmap.mmap(-1, 1)  # Shared with the nursery and all that come from it.
    late_end = child_side._end_with_launcher

    def be_killed(line: int) -> None:
        if not is_allowed[0]:
            os.abort()  # It is the first of its namespace: a signal of its own would be ignored.
        late_end(line)

    monkeypatch.setattr(child_side, "_end_with_launcher", be_killed)
    monkeypatch.setattr(syscalls, "reset_signals", _reset_signals_and_dump_no_core)
    with pytest.raises(JailFailed, match="is gone"):
        heard(asked(nursery, build()))
    is_allowed[0] = 1
    pid = nursery_pid(nursery)
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid
    (killed,) = others_than(nursery)
    os.waitpid(killed, 0)  # Nobody was told of it.


def _reset_signals_and_dump_no_core(reset: Callable[[], None] = syscalls.reset_signals) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reset()


def test_an_order_that_nobody_waits_for_any_more_costs_no_other(
    nursery: Nursery, build: Build
) -> None:
    nursery.begin()
    (spare,) = wait_for_spare(nursery)
    os.kill(spare, signal.SIGSTOP)
    stale = nursery.birth("/sys/fs/cgroup/nowhere")
    stale.line.close()
    os.close(stale._report)
    os.kill(spare, signal.SIGCONT)
    pid = nursery_pid(nursery)
    with born(nursery, build(), "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid
    stale._report = -1
    stale._free_places()


def test_what_a_child_copies_is_charged_to_its_group(
    nursery: Nursery, build: Build, tmp_path: Path
) -> None:
    size_bytes = 8 << 20
    (tmp_path / "initrd").write_bytes(os.urandom(size_bytes))
    group = Hierarchy.detect().create(f"kvmsec_test_{os.getpid()}", "guest")
    file = os.open(tmp_path / "initrd", os.O_RDONLY)
    try:
        copied = (BootFile(file, size_bytes, "initrd"),)
        jail = build(cgroups=group.tasks_files, boot_files=copied)
        nursery.begin()
        wait_for_spare(nursery)
        with born(nursery, jail, "/bin/sleep", "60", group=group.unified) as child:
            execute(child)
            (memory,) = [path for path in group.paths if Path(path, "memory.stat").exists()]
            lines = Path(memory, "memory.stat").read_text().splitlines()
            charged = dict(line.split() for line in lines)
            assert int(charged["shmem"]) >= size_bytes
    finally:
        os.close(file)
        group.kill(5)
        group.remove()


def test_the_end_of_one_birth_touches_no_other_at_any_moment(
    nursery: Nursery, build: Build
) -> None:
    jails_ = [build(), build()]
    for step in range(30):
        with born(nursery, jails_[0], "/bin/true") as first:
            execute(first)
            second = asked(nursery, jails_[1])
            time.sleep(step * 0.0003)
            first.leave_origin()
        nursery.prepare()
        heard(second).become(jails_[1], "/bin/sleep", ("sleep", "60"))
        execute(second)
        second.leave_origin()
        second.close()
        inside = os.readlink(f"/proc/{second.process.pid}/ns/net")
        others = [pid for pid in children_of(os.getpid()) if pid != second.process.pid]
        assert inside not in {os.readlink(f"/proc/{pid}/ns/net") for pid in others}
        end(second)
        jails_ = [build(), build()]


def test_a_used_spare_that_is_killed_leaves_its_child_alone(nursery: Nursery, build: Build) -> None:
    with born(nursery, build(), "/bin/sh", "-c", "exit 3") as child:
        (used,) = spares_of(nursery)
        kill(used)
        execute(child)
        assert status_of_end(child) == process.Ended(3, None)

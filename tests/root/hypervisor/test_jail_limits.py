"""The limits of a jailed process: as asked, hard and soft, and what they keep it from."""

import os
import resource
import select
from pathlib import Path
from typing import Any

import pytest

from hypervisor.jail import BootFile
from hypervisor.limits import ProcessLimits, parse_limits
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials, become
from kvmsec.linux.errors import ChildFailed
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    ROOT,
    SOMEBODY,
    Build,
    failure_of,
    held_by,
    newborn,
    running,
    said,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

OWN = ProcessLimits(
    open_files=333, processes=44, file_bytes=1 << 20, locked_bytes=0, oom_score_adjust=321
)


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_the_kernel_shows_each_limit_as_asked(build: Build, who: Any) -> None:
    with running(build(who, limits=OWN), "/bin/sleep", "60") as pid:
        shown = parse_limits(Path(f"/proc/{pid}/limits").read_text())
        assert OWN.problems_of(pid) == []
        others = ProcessLimits(open_files=334, processes=44, file_bytes=1 << 20)
        assert len(others.problems_of(pid)) == 2
        score = Path(f"/proc/{pid}/oom_score_adj").read_text()
        core = Path(f"/proc/{pid}/coredump_filter").read_text()
    expected = {
        "Max core file size": "1",
        "Max open files": "333",
        "Max processes": "44",
        "Max file size": str(1 << 20),
        "Max locked memory": "0",
        "Max address space": "unlimited",
        "Max msgqueue size": "0",
        "Max pending signals": "1024",
        "Max nice priority": "0",
        "Max realtime priority": "0",
    }
    assert {name: shown[name] for name in expected} == {k: (v, v) for k, v in expected.items()}
    assert (score, int(core, 16)) == ("321\n", 0)


def test_what_is_not_named_stays_as_the_launcher_has_it(build: Build) -> None:
    own = parse_limits(Path("/proc/self/limits").read_text())
    with running(build(), "/bin/sleep", "60") as pid:
        shown = parse_limits(Path(f"/proc/{pid}/limits").read_text())
    for name in ("Max processes", "Max stack size", "Max file locks", "Max cpu time"):
        assert shown[name] == own[name]


def test_a_file_can_become_no_larger(build: Build, tmp_path: Path) -> None:
    jail = build(limits=ProcessLimits(file_bytes=4096))
    line = "0123456789012345678901234567890123456789"
    # The first process of a PID namespace isn't ended by SIGXFSZ: it sees the error.
    said(jail, "/bin/sh", "-c", f"while echo {line}; do :; done >/output/file; echo went on")
    assert (tmp_path / "output" / "file").stat().st_size == 4096
    words = os.pread(jail.log, 4096, 0)
    assert b"went on" in words


def test_a_uid_of_its_own_forks_no_more_than_its_limit(build: Build) -> None:
    forks = "for n in 1 2 3 4 5 6 7 8 9; do sleep 60 & done; wait"
    jail = build(limits=ProcessLimits(processes=5))
    with newborn(jail, "/bin/sh", "-c", forks) as child:
        child.release()
        child.executed()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0], "the shell gives up at once"
    assert b"fork" in os.pread(jail.log, 4096, 0)


def test_boot_files_are_copied_within_the_limit_or_the_start_fails(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.ftruncate(firmware, 8192)
    files = (BootFile(firmware, 8192, "firmware"),)
    with running(
        build(boot_files=files, limits=ProcessLimits(file_bytes=8192)), "/bin/sleep", "60"
    ) as pid:
        assert Path(f"/proc/{pid}/root/boot/firmware").stat().st_size == 8192
    failed = failure_of(build(boot_files=files, limits=ProcessLimits(file_bytes=4096)), "/bin/true")
    os.close(firmware)
    assert failed.step == "boot files"


def test_a_limit_that_can_not_be_had_ends_the_start_and_is_named(build: Build) -> None:
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    failed = failure_of(build(limits=ProcessLimits(open_files=most + 1)), "/bin/true")
    assert failed.step == "limits"
    assert f"Max open files: {most + 1} can't be had" in failed.detail


def test_a_score_that_can_not_be_had_ends_the_start_and_is_named(build: Build) -> None:
    """Only who may spare a process may ask for it (CAP_SYS_RESOURCE); here nobody may."""
    jail = build(limits=ProcessLimits(oom_score_adjust=-1))

    def start_it() -> None:
        become(Credentials(0, 0))
        jail.cell.limits.apply()

    with pytest.raises(ChildFailed) as caught:
        run_in_child(start_it, what="starting", timeout_s=20)
    assert "oom_score_adj: -1 can't be had (Permission denied)" in caught.value.detail


def test_a_launcher_that_may_write_no_core_changes_nothing(build: Build) -> None:
    jail = build()

    def start_it() -> list[str]:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with running(jail, "/bin/sleep", "60") as pid:
            return jail.limits.problems_of(pid)

    assert run_in_child(start_it, what="starting", timeout_s=20, keep=held_by(jail)) == []


def test_one_that_ended_while_it_was_looked_at_is_no_failure_of_the_look(build: Build) -> None:
    jail = build()
    with newborn(jail, "/bin/true") as child:
        child.release()
        child.executed()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert Path(f"/proc/{child.process.pid}/coredump_filter").read_text() == ""
        assert jail.limits.problems_of(child.process.pid) == []

"""kvmsec's filter of system calls as the last step of a jail."""

import errno
import select
import signal

import pytest

from hypervisor import process
from hypervisor.seccomp import TICKET_BYTES, Filter, find_filter
from hypervisor.seccomp.gate import FIRST_OF_RULES
from kvmsec.linux import children, processes, syscalls
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    PROGRAMS,
    Build,
    binds_of,
    failure_of,
    field,
    held_by,
    newborn,
    running,
    said,
)

pytestmark = pytest.mark.root


def test_a_jailed_program_starts_and_starts_no_other(build: Build) -> None:
    jail = build(system_calls=find_filter())
    assert said(jail, "/bin/sh", "-c", "echo here; /bin/true; echo $?") == (
        0,
        "here\nBad system call\n159\n",  # a shell's 128, and SIGSYS
    )


def test_the_end_of_the_first_process_by_the_filter_is_told_as_such(build: Build) -> None:
    jail = build(system_calls=find_filter())
    with newborn(jail, "/bin/sh", "-c", "exec /bin/true") as child:
        child.release()
        child.executed()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert process.reap(child.pidfd) == process.Ended(None, signal.SIGSYS)


def test_the_kernel_shows_it_and_that_qemus_own_is_missing(build: Build) -> None:
    with newborn(build(system_calls=find_filter()), "/bin/sleep", "60") as child:
        child.release()
        child.executed()
        pid = child.process.pid
        assert field(pid, "Seccomp") == "2"
        status = processes.read_status(pid)
        if status is None or status.seccomp_filters is None:
            pytest.skip("this kernel does not count filters")
        assert process.confinement_problems(child) == ["seccomp filters 1, wanted at least 2"]


def test_a_jail_that_may_do_without_has_none(build: Build) -> None:
    with running(build(), "/bin/sleep", "60") as pid:
        assert field(pid, "Seccomp") == "0"


@pytest.mark.parametrize(
    ("program", "number", "words"),
    [
        # ret ALLOW
        (FIRST_OF_RULES + b"\x06\0\0\0\0\0\xff\x7f", 0, "lets a denied call pass"),
        # Ends nowhere: the kernel takes no such program.
        (FIRST_OF_RULES, errno.EINVAL, "Invalid argument"),
    ],
)
def test_a_filter_that_filters_nothing_starts_nothing(
    build: Build, program: bytes, number: int, words: str
) -> None:
    error = failure_of(build(system_calls=Filter(program, "odd")), "/bin/true")
    assert (error.step, error.errno) == ("system calls", number)
    assert words in error.message


def test_each_jail_has_a_ticket_of_its_own(build: Build) -> None:
    one, other = build(binds=binds_of(*PROGRAMS)), build(binds=binds_of(*PROGRAMS))
    assert one.ticket != other.ticket
    assert len(one.ticket) == TICKET_BYTES
    assert repr(one.ticket) not in repr(one), "it must not be in a log"


def test_filters_that_the_launcher_is_under_do_not_count(build: Build) -> None:
    """A daemon whose unit filters its calls hands that down: it is neither QEMU's nor ours."""
    jail = build(system_calls=find_filter())

    def verify_one() -> list[str]:
        syscalls.filter_system_calls(b"\x06\0\0\0\0\0\xff\x7f")  # allows everything
        with newborn(jail, "/bin/sleep", "60") as child:
            child.release()
            child.executed()
            return process.confinement_problems(child)

    told = children.run_in_child(verify_one, what="starting", timeout_s=20, keep=held_by(jail))
    if told == []:
        pytest.skip("this kernel does not count filters")
    assert told == ["seccomp filters 2, wanted at least 3"]

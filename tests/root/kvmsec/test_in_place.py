"""A child that goes on in its parent's memory: what they share, and what becomes of the parent."""

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from attrs import frozen

from kvmsec.linux import in_place, syscalls
from kvmsec.linux.namespaces import CLONE_NEWPID, CLONE_PARENT
from tests.root.hypervisor.jailed import wait_until

pytestmark = pytest.mark.root

NR_KCMP = 312  # linux/arch/x86/entry/syscalls/syscall_64.tbl
NR_PAUSE = "34"
KCMP_VM = 1  # linux/include/uapi/linux/kcmp.h
STATUS = 7
BOTH_WAYS = pytest.mark.usefixtures("in_one")
_libc = ctypes.CDLL(None, use_errno=True)


@frozen
class Pair:
    """The process that called, and its child; both are the test's own children."""

    caller: int
    child: int
    told: int

    def hear(self) -> str:
        return os.read(self.told, 4096).decode()

    def status_of_child(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@contextmanager
def pair(function: Callable[[Callable[[object], None]], None], flags: int = 0) -> Iterator[Pair]:
    """Have a process go on as a child of its own parent's, which calls the function."""
    told, tell = os.pipe()
    caller = os.fork()
    if caller == 0:
        _go_on(function, flags, lambda what: os.write(tell, str(what).encode()) and None)
    os.close(tell)
    child = -1
    try:
        child = int(os.read(told, 20))
        yield Pair(caller, child, told)
    finally:
        for pid in {caller, child} - {-1}:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        os.close(told)


def _go_on(
    function: Callable[[Callable[[object], None]], None],
    flags: int,
    tell: Callable[[object], None],
) -> NoReturn:
    try:
        in_place.become_child(flags | CLONE_PARENT)
        tell(f"{os.readlink('/proc/self'):20}")
        function(tell)
    finally:
        os._exit(STATUS)


def share_memory(one: int, other: int) -> bool:
    """kcmp(2)"""
    result = _libc.syscall(ctypes.c_long(NR_KCMP), one, other, KCMP_VM, 0, 0)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return bool(result == 0)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_pause(pid: int) -> None:
    """It sleeps, and has no descriptor then."""
    wait_until(lambda: Path(f"/proc/{pid}/syscall").read_text().split()[0] == NR_PAUSE)
    assert os.listdir(f"/proc/{pid}/fd") == []


@pytest.fixture(params=[True, False], ids=["in place", "copied"])
def in_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the two have one memory, or the child a copy, as on another processor."""
    in_place._clone_or_sleep.cache_clear()
    if not request.param:
        monkeypatch.setattr(in_place, "_CODE", {})
    yield request.param
    in_place._clone_or_sleep.cache_clear()


def test_the_child_goes_on_in_the_callers_memory_until_it_executes_a_program(
    *, in_one: bool
) -> None:
    go_on, go = os.pipe()

    def work(_: object) -> None:
        os.read(go_on, 1)
        os.execv("/bin/sleep", ("sleep", "60"))

    with pair(work) as two:
        assert share_memory(two.caller, two.child) == in_one
        os.write(go, b"g")
        wait_until(lambda: Path(f"/proc/{two.child}/comm").read_text() == "sleep\n")
        assert not share_memory(two.caller, two.child)
        wait_for_pause(two.caller)
    os.close(go_on)
    os.close(go)


@BOTH_WAYS
def test_the_child_returns_from_all_that_called_and_has_what_the_caller_had() -> None:
    def work(tell: Callable[[object], None]) -> None:
        numbers = [*map(str, range(1000))]
        tell(f"{len(''.join(numbers))} {os.getcwd()} {os.stat('/').st_ino}")

    with pair(work) as two:
        assert two.status_of_child() == STATUS
        assert two.hear() == f"2890 {os.getcwd()} {os.stat('/').st_ino}"
        wait_for_pause(two.caller)


@BOTH_WAYS
def test_it_is_made_with_the_flags_that_are_given() -> None:
    with pair(lambda tell: tell(os.getpid()), CLONE_NEWPID) as two:
        assert two.hear() == "1"
        assert two.status_of_child() == STATUS


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@BOTH_WAYS
def test_a_child_that_is_killed_gives_the_caller_nothing_to_do(how: signal.Signals) -> None:
    with pair(lambda _: signal.pause() and None) as two:
        os.kill(two.child, how)
        assert two.status_of_child() == -how
        wait_for_pause(two.caller)
        assert state_of(two.caller) == "S"


@BOTH_WAYS
def test_a_caller_that_is_killed_leaves_the_child_alone() -> None:
    go_on, go = os.pipe()

    def work(tell: Callable[[object], None]) -> None:
        os.read(go_on, 1)
        tell(sum(range(100_000)))

    with pair(work) as two:
        os.kill(two.caller, signal.SIGKILL)
        os.waitpid(two.caller, 0)
        os.write(go, b"g")
        assert two.status_of_child() == STATUS
        assert two.hear() == "4999950000"
    os.close(go_on)
    os.close(go)


@BOTH_WAYS
def test_what_the_kernel_refuses_is_raised_in_the_caller_which_goes_on() -> None:
    with open("/dev/null") as no_group, pytest.raises(OSError) as raised:
        in_place.become_child(0, no_group.fileno())
    assert raised.value.errno == errno.EBADF


def test_where_nobody_may_execute_what_was_written_the_child_has_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "as SELinux does without execmem")

    in_place._clone_or_sleep.cache_clear()
    monkeypatch.setattr(syscalls, "protect", refuse)
    try:
        with pair(lambda _: signal.pause() and None) as two:
            assert not share_memory(two.caller, two.child)
    finally:
        in_place._clone_or_sleep.cache_clear()


@pytest.mark.parametrize("limit_kib", [1 << 30, 64, 0])
def test_what_a_fork_left_to_be_copied_is_copied_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, limit_kib: int
) -> None:
    monkeypatch.setattr(in_place, "COPIED_BYTES", limit_kib << 10)

    def shared_kib() -> int:
        """Memory of the heap that is not the caller's alone (proc_pid_smaps(5))."""
        _, _, rest = Path("/proc/self/smaps").read_text().partition("[heap]")
        lines = rest.partition("VmFlags")[0].splitlines()
        values = dict(line.split(":") for line in lines if ":" in line)
        return int(values["Shared_Dirty"].split()[0])

    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before = shared_kib()
            in_place.copy_shared_pages()
            os.write(tell, f"{before} {shared_kib()}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    before, after = map(int, os.read(told, 100).split())
    os.close(told)
    os.waitpid(pid, 0)
    assert before > 128
    if limit_kib > before:
        assert after == 0
    else:  # Python itself touches some more meanwhile.
        assert 0 < after < before

"""Nothing of a parent's is in its child: no descriptor, terminal, signal handler or garbage."""

import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmsec.linux import children
from kvmsec.linux.errors import ChildFailed
from tests.unit.kvmsec.linux.working import DEADLINE_S, nothing_is_left, open_descriptors, run

__all__ = ["nothing_is_left"]

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_what_a_child_prints_goes_nowhere() -> None:
    def print_much() -> int:
        return sum(os.write(number, b"y" * 300_000) for number in (1, 2))

    reader, writer = os.pipe()
    saved = [os.dup(1), os.dup(2)]
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        assert run(print_much) == 600_000
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(writer)
        printed = os.read(reader, 10)
        for descriptor in (*saved, reader):
            os.close(descriptor)
    assert printed == b""


def test_a_child_has_no_terminal_and_none_of_the_parents_descriptors() -> None:
    primary, terminal = os.openpty()
    left, right = socket.socketpair()
    os.set_inheritable(left.fileno(), True)
    kept = os.open("/etc/hostname", os.O_RDONLY)

    def look() -> Any:
        targets = {number: os.readlink(f"/proc/self/fd/{number}") for number in open_descriptors()}
        return [os.getsid(0) == os.getpid(), targets]

    saved = os.dup(0)
    try:
        os.dup2(terminal, 0)
        leads_session, targets = run(look, keep=[kept])
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, primary, terminal, kept):
            os.close(descriptor)
        left.close()
        right.close()
    assert leads_session
    pipe = [number for number, target in targets.items() if target.startswith("pipe:")]
    assert len(pipe) == 1
    assert targets == {
        "0": "/dev/null",
        "1": "/dev/null",
        "2": "/dev/null",
        str(kept): os.path.realpath("/etc/hostname"),
        pipe[0]: targets[pipe[0]],
    }


def test_it_works_in_a_process_without_standard_streams() -> None:
    program = (
        "import os\n"
        "from kvmsec.linux.children import run_in_child\n"
        "kept = os.memfd_create('kept')\n"
        "assert kept == 0\n"
        "os.write(kept, b'abc')\n"
        "read = lambda: os.pread(kept, 3, 0).decode()\n"
        "told = run_in_child(read, what='reading', timeout_s=10, keep=[kept])\n"
        "os._exit(0 if told == 'abc' else 1)\n"
    )
    closed = 'exec 0<&- 1>&- 2>&-; exec "$0" "$@"'
    done = subprocess.run(["sh", "-c", closed, sys.executable, "-c", program], check=False)
    assert done.returncode == 0


def test_it_works_with_more_descriptors_than_select_takes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400:
        pytest.skip("this process may not open enough descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1200)]
    try:
        assert run(lambda: len(open_descriptors())) == 4
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_is_left_when_no_descriptor_is_to_be_had() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = max(map(int, os.listdir("/proc/self/fd"))) + 1
    try:
        for more in range(lowest, lowest + 4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, limits[1]))
            try:
                assert children.run_in_child(lambda: 1, what="working", timeout_s=5) == 1
                break
            except (OSError, ChildFailed):
                continue
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("function", [lambda: "fine", lambda: 1 / 0])
def test_a_parent_that_ignores_sigchld_gets_its_answers_all_the_same(
    function: Callable[[], Any],
) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run(function) == "fine"
    except ChildFailed as failure:
        assert failure.kind == "ZeroDivisionError"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_parent_whose_handler_reaps_everything_gets_its_answers_all_the_same() -> None:
    def reap_all(*_: object) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    before = signal.signal(signal.SIGCHLD, reap_all)
    try:
        for turn in range(20):
            assert run(lambda turn=turn: turn) == turn
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_can_wait_for_programs_of_its_own_whatever_its_parent_ignores() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run(lambda: subprocess.run(["false"], check=False).returncode) == 1
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_signals_are_the_childs_own() -> None:
    def look() -> Any:
        handlers = [
            number
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}
            if signal.getsignal(number) not in (signal.SIG_DFL, None)
        ]
        return [
            handlers,
            list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            signal.set_wakeup_fd(-1),
        ]

    left, right = socket.socketpair()
    left.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(left.fileno())
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        assert run(look) == [[], [], -1]
        assert signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.set_wakeup_fd(old_wakeup)
        signal.signal(signal.SIGUSR1, before)
        left.close()
        right.close()


def test_no_signal_brings_the_child_into_the_parents_code() -> None:
    """What a Ctrl-C in the middle of forks would: undo the parent's work in two processes."""
    program = """
import os, signal, time
from kvmsec.linux import children

me = os.getpid()
def tell(*_):
    if os.getpid() != me:
        os.write(1, b"stray ")
signal.signal(signal.SIGUSR1, tell)
end = time.monotonic() + 1.5
killer = os.fork()
if killer == 0:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while time.monotonic() < end:
        time.sleep(0.0002)
        os.killpg(0, signal.SIGUSR1)
    os._exit(0)
while time.monotonic() < end:
    pid = children.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
os.waitpid(killer, 0)  # An interpreter that ends has no handlers any more: a late signal kills.
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        start_new_session=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()


def test_the_parents_garbage_is_not_finalized_in_the_child() -> None:
    """A finalizer closes a descriptor by its number, which in a jail may be a granted one."""
    reader, writer = os.pipe()

    class Finalized:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            os.write(writer, str(os.getpid()).encode())

    gc.disable()
    try:
        Finalized()
        assert run(gc.collect, keep=[writer]) >= 0
        assert not select.select([reader], [], [], 0)[0]
        gc.collect()
        assert os.read(reader, 100) == str(os.getpid()).encode()
    finally:
        gc.enable()
        os.close(reader)
        os.close(writer)


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Also one that has become somebody else: the kernel forgets the order at that."""
    program = (
        "import os, signal, sys\n"
        "from kvmsec.linux.children import start_child\n"
        "from kvmsec.linux.credentials import Credentials\n"
        "who = Credentials(239999, 239999) if os.geteuid() == 0 else None\n"
        "def stay():\n"
        "    os.write(kept, b'%d' % os.getpid())\n"
        "    signal.pause()\n"
        "kept = int(sys.argv[1])\n"
        "start_child(stay, what='staying', credentials=who, keep=[kept])\n"
        "signal.pause()\n"
    )
    reader, writer = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(writer)], pass_fds=[writer], stdin=subprocess.DEVNULL
    )
    os.close(writer)
    try:
        assert int(os.read(reader, 100)) > 0
        parent.kill()
        parent.wait()
        assert select.select([reader], [], [], DEADLINE_S)[0], "the child is still there"
        assert os.read(reader, 1) == b""  # The last holder of the pipe has ended.
    finally:
        os.close(reader)


@pytest.mark.parametrize("kept", [set(), {0}, {5}, {0, 1, 2, 9}, {0, 2, 3, 4}])
def test_all_but_the_listed_descriptors_are_closed(kept: set[int]) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            high = 40
            os.dup2(writer, high)
            children_kept = {*kept, high}
            for number in range(3, 12):
                os.dup2(0, number)
            children.close_all_but(children_kept)
            found = [number for number in range(40) if _is_open(number)]
            os.write(high, repr(found).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 4096)
    os.close(reader)
    os.waitpid(pid, 0)
    assert told == repr(sorted(kept)).encode()


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

"""kvmsec's filter of system calls in the kernel: each denied call is made for real.

Made as root with every capability, so that nothing but the filter can be what refuses.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from attrs import frozen

from hypervisor.seccomp import TICKET_BYTES, find_filter
from hypervisor.seccomp.gate import X32_BIT
from hypervisor.seccomp.library import load_library
from hypervisor.seccomp.rules import NEWEST, RULES, Answer
from kvmsec.linux import children, syscalls
from kvmsec.linux.credentials import Credentials, become

pytestmark = pytest.mark.root

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS = 38
TICKET = bytes(range(TICKET_BYTES))
SHOWN = tuple(int.from_bytes(TICKET[at : at + 8], "little") for at in (0, 8, 16))
SIGSYS: Final = signal.SIGSYS

DENIED = [(call, rule.answer) for rule in RULES if not rule.when for call in rule.calls]
HARMLESS = {"init_module": (0, 0, 0)}  # The others are given six times -1, and do nothing with it.


@frozen
class Outcome:
    """What became of a child: the signal that ended it, or the number that it gave."""

    signal: int = 0
    number: int | None = None


def apart(work: Callable[[], int], *, filtered: bool) -> Outcome:
    """Do something in a child, under the filter or not; it gives a small number."""
    reader, writer = os.pipe()
    program = find_filter().with_gate(TICKET)
    pid = children.fork()
    if pid == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if filtered:
                syscalls.prctl(PR_SET_NO_NEW_PRIVS, 1)
                syscalls.filter_system_calls(program)
            os.write(writer, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with open(reader, encoding="ascii") as words:
        number = words.read()
    return Outcome(status & 0x7F, int(number) if number else None)


def error_of(number: int, *arguments: int) -> int:
    """Make a call by its number; its error, 0 where it has none."""
    ctypes.set_errno(0)
    given = (ctypes.c_long(one) for one in (number, *arguments))
    return ctypes.get_errno() if libc.syscall(*given) == -1 else 0


def error_of_socket(*arguments: int) -> int:
    try:
        socket.socket(*arguments).close()
    except OSError as error:
        return error.errno or -1
    return 0


def expected(answer: Answer) -> Outcome:
    return Outcome(SIGSYS) if answer.errno is None else Outcome(0, answer.errno)


# What is denied


@pytest.mark.parametrize(("call", "answer"), DENIED, ids=[call for call, _ in DENIED])
def test_a_denied_call_gets_its_answer_which_is_the_filters(call: str, answer: Answer) -> None:
    number, arguments = load_library().number_of(call), HARMLESS.get(call, (-1,) * 6)

    def attempt() -> int:
        return error_of(number, *arguments)

    assert apart(attempt, filtered=True) == expected(answer)
    without = apart(attempt, filtered=False)
    assert without.signal == 0
    # What this kernel hasn't got can't be told from what is denied as if it hadn't.
    if without.number != errno.ENOSYS:
        assert without.number != answer.errno


@pytest.mark.parametrize("bit", [17, *range(25, 31)])
def test_no_clone_makes_a_namespace_and_without_the_filter_it_does(bit: int) -> None:
    def clone() -> int:
        made: int = libc.syscall(56, (1 << bit) | signal.SIGCHLD, 0, 0, 0, 0)
        if made == 0:
            os._exit(0)
        return int(made > 0)

    assert apart(clone, filtered=True) == Outcome(SIGSYS)
    assert apart(clone, filtered=False) == Outcome(0, 1)


def test_a_plain_clone_is_a_fork() -> None:
    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert apart(fork, filtered=True) == Outcome(0, 7)


def test_clone3_makes_no_thread_and_the_c_library_makes_one_without() -> None:
    def start_threads() -> int:
        said: list[int] = []
        lock = threading.Lock()

        def speak() -> None:
            with lock:
                said.append(1)

        threads = [threading.Thread(target=speak) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(said)

    assert apart(start_threads, filtered=True) == Outcome(0, 8)


PACKET = socket.AF_PACKET
SOCKETS = [
    *((family, kind, 0) for family in range(48) for kind in (1, 2)),
    *((family, socket.SOCK_RAW, 1) for family in (socket.AF_INET, socket.AF_INET6)),
    *((socket.AF_INET, kind, protocol) for kind, protocol in ((5, 132), (1, 262), (6, 33), (2, 1))),
    (PACKET, socket.SOCK_RAW, 0),
    (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0),
]


def test_sockets_are_of_three_families_and_two_kinds() -> None:
    def open_all() -> int:
        for wanted in SOCKETS:
            family, kind, protocol = wanted
            plain = family in (1, 2, 10) and kind in (1, 2) and protocol in (0, 6, 17)
            if error_of_socket(*wanted) != (0 if plain else errno.EAFNOSUPPORT):
                return 1 + SOCKETS.index(wanted)
        return 0

    assert apart(open_all, filtered=True) == Outcome(0, 0)


@pytest.mark.parametrize(
    "wanted",
    [
        (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        (PACKET, socket.SOCK_RAW, 0),
        (socket.AF_INET, socket.SOCK_RAW, 1),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0),
    ],
)
def test_without_the_filter_such_a_socket_can_be_had(wanted: tuple[int, int, int]) -> None:
    assert apart(lambda: error_of_socket(*wanted), filtered=False) == Outcome(0, 0)
    refused = Outcome(0, errno.EAFNOSUPPORT)
    assert apart(lambda: error_of_socket(*wanted), filtered=True) == refused


def test_bits_above_an_int_bring_no_other_family() -> None:
    """The kernel looks at the low 32 bits: a filter that compared only those, or all, may err."""
    for family in (socket.AF_NETLINK, socket.AF_UNIX, PACKET):
        wide = (1 << 32) + family

        def attempt(family: int = wide) -> int:
            return error_of(41, family, socket.SOCK_DGRAM, 0)

        assert apart(attempt, filtered=True) == Outcome(0, errno.EAFNOSUPPORT)
        assert apart(attempt, filtered=False).number != errno.EAFNOSUPPORT


def test_a_pair_is_of_unix_sockets() -> None:
    def pairs() -> int:
        one, other = socket.socketpair()
        one.sendall(b"x")
        return other.recv(1)[0]

    assert apart(pairs, filtered=True) == Outcome(0, ord("x"))
    other = apart(lambda: error_of(53, socket.AF_INET, 1, 0, 0), filtered=True)
    assert other == Outcome(0, errno.EAFNOSUPPORT)
    assert apart(lambda: error_of(53, socket.AF_INET, 1, 0, 0), filtered=False) != other


IOC_PR_REGISTER = 0x401870C8  # linux/pr.h
LOOP_SET_STATUS64, BLKGETSIZE64 = 0x4C04, 0x80081272  # linux/loop.h, linux/fs.h


@pytest.fixture
def window(tmp_path: Path) -> Iterator[str]:
    """A loop device that shows one page of a larger file."""
    file = tmp_path / "larger"
    file.write_bytes(bytes(1 << 20))
    argv = ("losetup", "--find", "--show", "--offset=8192", "--sizelimit=4096", str(file))
    if not Path("/dev/loop-control").exists():
        pytest.skip("this kernel has no loop devices")
    made = subprocess.run(argv, check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def error_of_ioctl(device: str, request: int, *, as_nobody: bool = False) -> int:
    """`as_nobody`: with neither a capability nor root's uid, but a descriptor that may write."""
    descriptor = os.open(device, os.O_RDWR)
    if as_nobody:
        become(Credentials(65534, 65534))
    try:
        fcntl.ioctl(descriptor, request, bytes(232))
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_window_of_a_larger_file_stays_what_it_is(window: str) -> None:
    def size() -> int:
        descriptor = os.open(window, os.O_RDONLY)
        try:
            (found,) = struct.unpack("Q", fcntl.ioctl(descriptor, BLKGETSIZE64, bytes(8)))
            return int(found)
        finally:
            os.close(descriptor)

    def widen() -> int:
        return error_of_ioctl(window, LOOP_SET_STATUS64)

    def widen_as_nobody() -> int:
        return error_of_ioctl(window, LOOP_SET_STATUS64, as_nobody=True)

    assert apart(widen, filtered=True) == Outcome(0, errno.EPERM)
    assert size() == 4096
    assert apart(widen_as_nobody, filtered=False) == Outcome(0, 0)
    assert size() == 1 << 20


def test_nothing_is_reserved_below_a_block_device(window: str) -> None:
    def reserve() -> int:
        return error_of_ioctl(window, IOC_PR_REGISTER)

    def reserve_as_nobody() -> int:
        return error_of_ioctl(window, IOC_PR_REGISTER, as_nobody=True)

    assert apart(reserve, filtered=True) == Outcome(0, errno.EPERM)
    # That a loop device keeps none is said to who may ask: to root before Linux 6.5.
    version = tuple(map(int, platform.release().split(".")[:2]))
    ask = reserve if version < (6, 5) else reserve_as_nobody
    assert apart(ask, filtered=False) == Outcome(0, errno.EOPNOTSUPP)


def test_calls_that_nobody_looked_at_do_not_exist() -> None:
    def attempt() -> int:
        wrong = [
            number
            for number in (*range(NEWEST + 1, NEWEST + 40), 2000)
            if error_of(number, -1, -1, -1, -1, -1, -1) != errno.ENOSYS
        ]
        return len(wrong)

    assert apart(attempt, filtered=True) == Outcome(0, 0)


# Other architectures


def test_a_call_of_x32_ends_the_process() -> None:
    def attempt() -> int:
        return error_of(X32_BIT | 39)  # getpid

    assert apart(attempt, filtered=True) == Outcome(SIGSYS)
    assert apart(attempt, filtered=False).signal == 0


@pytest.mark.parametrize("number", [20, 11, 102, 26])  # getpid, execve, socketcall, ptrace
def test_a_call_of_i386_ends_the_process(number: int) -> None:
    def attempt() -> int:
        place = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        # push rbx; xor ebx, ebx; mov eax, number; int 0x80; pop rbx; ret
        place.write(b"\x53\x31\xdb\xb8" + number.to_bytes(4, "little") + b"\xcd\x80\x5b\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(place))
        ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        return 0

    without = apart(attempt, filtered=False)
    if without.signal == signal.SIGSEGV:
        pytest.skip("this kernel has no calls of i386")
    assert without == Outcome(0, 0)
    assert apart(attempt, filtered=True) == Outcome(SIGSYS)


# One program


def test_a_program_is_executed_with_the_ticket_alone() -> None:
    def execute(extra: tuple[int, int, int]) -> Callable[[], int]:
        def attempt() -> int:
            argv = syscalls.strings(("sh", "-c", "kill -USR1 $$"))
            syscalls.execute("/bin/sh", argv, syscalls.strings(["PATH=/bin"]), extra)
            return 0

        return attempt

    assert apart(execute(SHOWN), filtered=True) == Outcome(signal.SIGUSR1)
    assert apart(execute((0, 0, 0)), filtered=True) == Outcome(SIGSYS)
    wrong = (SHOWN[0], SHOWN[1], SHOWN[2] ^ (1 << 63))
    assert apart(execute(wrong), filtered=True) == Outcome(SIGSYS)
    assert apart(execute(wrong), filtered=False) == Outcome(signal.SIGUSR1)


def test_a_program_of_memory_is_not_executed() -> None:
    def attempt() -> int:
        program = os.memfd_create("program")
        with open("/bin/true", "rb") as file:
            os.write(program, file.read())
        os.execve(program, ["true"], {})
        return 0

    assert apart(attempt, filtered=True) == Outcome(SIGSYS)
    assert apart(attempt, filtered=False) == Outcome(0, None)


# What goes on working


def test_what_qemu_lives_on_works() -> None:
    def live() -> int:
        assert os.read(os.eventfd(3), 8) == (3).to_bytes(8, "little")
        assert len(mmap.mmap(-1, 1 << 20)) == 1 << 20
        context = ctypes.c_ulong(0)
        assert libc.syscall(206, 8, ctypes.byref(context)) == 0  # io_setup: aio=native
        os.memfd_create("memory")
        os.kill(os.getpid(), 0)
        signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
        # QEMU's own filter, by either way that there is.
        syscalls.filter_system_calls(b"\x06\0\0\0\0\0\xff\x7f")
        assert error_of(317, 1, 0, 0) == errno.EFAULT  # seccomp(SECCOMP_SET_MODE_FILTER)
        return 0

    assert apart(live, filtered=True) == Outcome(0, 0)


def test_it_can_not_be_read_back_from_outside_without_the_nodes_root() -> None:
    """What reads a filter (PTRACE_SECCOMP_GET_FILTER) asks for CAP_SYS_ADMIN first."""

    def attempt() -> Any:
        child = subprocess.Popen(["/bin/sleep", "60"])
        try:
            libc.ptrace.restype = ctypes.c_long
            assert libc.ptrace(0x4206, child.pid, None, None) == 0  # PTRACE_SEIZE
            assert libc.ptrace(0x4207, child.pid, None, None) == 0  # PTRACE_INTERRUPT
            os.waitpid(child.pid, 0x40000000)  # __WALL
            ctypes.set_errno(0)
            assert libc.ptrace(0x420C, child.pid, 0, None) == -1
            return ctypes.get_errno()
        finally:
            child.kill()

    asked = children.run_in_child(
        attempt, what="reading a filter", timeout_s=20, credentials=Credentials(239001, 239002)
    )
    assert asked == errno.EACCES

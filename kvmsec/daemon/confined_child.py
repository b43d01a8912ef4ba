"""Starting the front and the courier: a fresh interpreter, shut in before it hears the network.

A new program and no plain fork: nothing of the root part's memory is in it, neither a key nor a
hint where anything lies (ASLR), whenever it is started.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.daemon.confinement import ConfinementFailed
from kvmsec.daemon.inspection import require_confined
from kvmsec.linux import children, syscalls
from kvmsec.linux.command import ENVIRONMENT
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.forking import fork_init

READY: Final = b'{"ready": true}\n'
CONTROL: Final = 3
"""The descriptor in the child on which it says that it is shut in; its sockets follow it."""
_READY_TIMEOUT_S: Final = 30.0
_REPORT_LIMIT_BYTES: Final = 1 << 16
_WORDS_LIMIT_BYTES: Final = 64 * 1024


@frozen(kw_only=True)
class Start:
    """What a confined process is told on its command line, where everybody may read it.

    program: the module whose `main` it runs. mount_point: see `Confinement`. cache: where compiled
    filters are kept. filter_may_be_missing: `confinement.may_be_missing` names "seccomp".
    """

    name: str
    program: str
    credentials: Credentials
    mount_point: str
    cache: str | None
    filter_may_be_missing: bool

    def encode(self, sockets: int) -> str:
        return json.dumps(
            {
                "name": self.name,
                "uid": self.credentials.uid,
                "gid": self.credentials.gid,
                "mount_point": self.mount_point,
                "cache": self.cache,
                "filter_may_be_missing": self.filter_may_be_missing,
                "sockets": sockets,
            }
        )


class ConfinedChild:
    """A confined process, its control socket and its pidfd; it ends with this process."""

    def __init__(self, start: Start, pid: int, pidfd: int, control: socket.socket, errors: int):
        self.start = start
        self.pid = pid
        self.pidfd = pidfd
        self._control: socket.socket | None = control
        self._errors = errors
        self._words = bytearray()

    async def ready(self) -> None:
        """Wait until it is shut in, and see in /proc that it is.

        Raises ConfinementFailed, also where it does not say so within 30 seconds or ends after it
        did; and OSError.
        """
        assert self._control is not None
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                line = await _read_line(self._control)
        except TimeoutError:
            raise ConfinementFailed("start", 0, "it did not answer in time") from None
        if line != READY:
            raise _failure(line, self.words())
        has_filter = not self.start.filter_may_be_missing
        try:
            require_confined(self.pid, self.start.credentials, has_filter=has_filter)
        except ConfinementFailed as error:
            if not (words := self.words()):
                raise
            detail = f"{error.detail}; it said: {words}"
            raise ConfinementFailed(error.step, error.errno, detail) from error

    async def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Its control socket, once it is ready: the caller's to close from now on.

        Closed by anybody else, its number would be a new socket's while the event loop still
        watches it for this one.
        """
        assert self._control is not None
        streams = await asyncio.open_connection(sock=self._control)
        self._control = None
        return streams

    def words(self) -> str:
        """What it has said on stderr, as one escaped line; empty where it said nothing."""
        with contextlib.suppress(BlockingIOError):
            while self._errors >= 0 and (chunk := os.read(self._errors, 1 << 14)):
                # Read to its end, so that it never waits; kept as far as anybody would read.
                self._words = (self._words + chunk)[-_WORDS_LIMIT_BYTES:]
        return escaped(bytes(self._words).strip(), limit_chars=4000)

    def end(self) -> str:
        """Kill it, take its zombie, free what belongs to it, and say how it ended."""
        how = "was gone"
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            how = _reaped(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        if self._control is not None:
            self._control.close()
        if self._errors >= 0:
            self.words()
            os.close(self._errors)
            self._errors = -1
        return how


def _reaped(pidfd: int) -> str:
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return "ended, unseen,"
    assert ended is not None  # waitid(2) has none only where it may return at once
    if ended.si_code == os.CLD_EXITED:
        return f"exited with status {ended.si_status}"
    return f"was ended by signal {ended.si_status}"


def start_confined(start: Start, sockets: Sequence[socket.socket]) -> ConfinedChild:
    """Start a confined process that is given `sockets`, in their order after its control socket.

    The caller has one thread. Raises ManyThreads and OSError.
    """
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        refuse_descriptors(ours)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, reader)
        os.set_blocking(reader, False)
        with theirs:
            try:
                pid, pidfd = fork_init()
                if pid == 0:
                    given = (theirs.fileno(), *(one.fileno() for one in sockets))
                    _execute(start, writer, given)
            finally:
                os.close(writer)
        ours.setblocking(False)
        undo.pop_all()
    return ConfinedChild(start, pid, pidfd, ours, reader)


def refuse_descriptors(one: socket.socket) -> None:
    """Have the kernel take no descriptor for this socket, where it can (Linux 6.16).

    Nothing here reads one in any case, and SO_LINGER is denied to whoever could send one.
    """
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, 83, 0)  # asm-generic/socket.h, SO_PASSRIGHTS


def _execute(start: Start, errors: int, given: Sequence[int]) -> NoReturn:
    try:
        syscalls.end_with_parent()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        wanted = [null, null, errors, *given]
        # First out of each other's way, then into place: a plain dup2 could hit one still needed.
        moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, len(wanted) + 64) for one in wanted]
        for number, ours in enumerate(moved):
            os.dup2(ours, number, inheritable=True)
        children.close_all_but(range(len(wanted)))
        code = f"from {start.program} import main; main()"
        argv = [sys.executable, "-I", "-c", code, start.encode(len(given) - 1)]
        os.execve(sys.executable, argv, ENVIRONMENT)
    finally:
        os._exit(127)


async def _read_line(control: socket.socket) -> bytes:
    """One line and no byte after it: what follows belongs to whoever talks on the socket next."""
    loop = asyncio.get_running_loop()
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _REPORT_LIMIT_BYTES:
        byte = await loop.sock_recv(control, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def _failure(line: bytes, words: str) -> ConfinementFailed:
    try:
        told: Any = json.loads(line)
        step, number, detail = str(told["step"]), int(told["errno"]), str(told["detail"])
    except (ValueError, TypeError, KeyError):
        said = f"it said: {words}" if words else "it said nothing"
        return ConfinementFailed("start", 0, f"the process ended; {said}")
    return ConfinementFailed(step, number, escaped(detail, limit_chars=1000))

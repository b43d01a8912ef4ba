"""What the root part holds of a confined process, and who closes it."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmsec.daemon.confined_child import READY, ConfinedChild
from kvmsec.daemon.confinement import ConfinementFailed
from tests.unit.kvmsec.daemon.a_start import START


@contextmanager
def held(*, said: bytes = b"", words: bytes = b"") -> Iterator[ConfinedChild]:
    """A child that has said something on its control socket, and words on stderr."""
    process = subprocess.Popen(["sleep", "60"])
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.write(writer, words)
    os.close(writer)
    found = ConfinedChild(START, process.pid, os.pidfd_open(process.pid), ours, reader)
    with theirs:
        theirs.sendall(said)
        yield found
    found.end()
    process.wait()


@pytest.fixture
def child() -> Iterator[ConfinedChild]:
    with held() as found:
        yield found


def test_a_number_that_the_loop_still_watches_is_nobody_elses(child: ConfinedChild) -> None:
    """A socket that was accepted next had it, and ended the daemon (RuntimeError: it is used)."""

    async def act() -> None:
        _, writer = await child.streams()
        number = writer.get_extra_info("socket").fileno()
        child.end()
        accepted = [one for _ in range(3) for one in socket.socketpair()]
        assert number not in {one.fileno() for one in accepted}
        for one in accepted:
            one.close()
        writer.close()
        await writer.wait_closed()

    asyncio.run(act())


def test_a_control_socket_that_nobody_took_goes_with_its_process(child: ConfinedChild) -> None:
    before = set(os.listdir("/proc/self/fd"))
    child.end()
    assert len(before - set(os.listdir("/proc/self/fd"))) == 3  # With its pidfd and its words.


def test_one_that_ends_once_it_is_ready_fails_with_its_words() -> None:
    with held(said=READY, words=b"out of memory\n") as child:
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ConfinementFailed) as raised:
            asyncio.run(child.ready())
    assert raised.value.detail == "it has ended; it said: out of memory"

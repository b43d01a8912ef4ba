"""What the root part holds of a confined process, and who closes it."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from kvmsec.daemon.confined_child import ConfinedChild, Start
from kvmsec.linux.credentials import Credentials

START = Start(
    name="trial",
    program="nothing",
    credentials=Credentials(65534, 65534),
    mount_point="/nowhere",
    cache=None,
    filter_may_be_missing=False,
)


@pytest.fixture
def child() -> Iterator[ConfinedChild]:
    process = subprocess.Popen(["sleep", "60"])
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(writer)
    found = ConfinedChild(START, process.pid, os.pidfd_open(process.pid), ours, reader)
    with theirs:
        yield found
    found.end()
    process.wait()


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

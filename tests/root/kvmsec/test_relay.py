"""A relay between us and a socket: bytes both ways, and only it is held up by what is passed."""

import array
import asyncio
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.monitor import Monitor
from kvmsec.linux import processes, relay, unix_sockets
from kvmsec.linux.children import start_child
from kvmsec.linux.relay import RelayedSocket
from kvmsec.linux.unix_diag import waits_for_accept

pytestmark = pytest.mark.root
DEADLINE_S = 20.0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with unix_sockets.listen(tmp_path / "sock") as listening:
        listening.settimeout(DEADLINE_S)
        yield listening


_others: set[int] = set()


@pytest.fixture(autouse=True)
def no_child_of_another_test() -> Iterator[None]:
    _others.update(relays())
    yield
    _others.clear()


def connect_by_relay(path: Path) -> socket.socket:
    """As on a kernel that can't refuse descriptors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unix_sockets, "_refuse_descriptors", lambda _: False)
        return unix_sockets.connect(path)


@pytest.fixture
def connected(tmp_path: Path, listener: socket.socket) -> Iterator[RelayedSocket]:
    near = connect_by_relay(tmp_path / "sock")
    assert isinstance(near, RelayedSocket)
    yield near
    near.close()


def relays() -> list[int]:
    """The children of this process that the test has made."""
    me = os.getpid()
    pids = map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split())
    return [pid for pid in pids if pid not in _others]


def read_all(near: socket.socket, count: int) -> bytes:
    heard = b""
    while len(heard) < count:
        assert select.select([near], [], [], DEADLINE_S)[0]
        data = near.recv(1 << 16)
        assert data
        heard += data
    return heard


def test_bytes_go_both_ways_in_any_amount(
    connected: RelayedSocket, listener: socket.socket
) -> None:
    far, _ = listener.accept()
    far.settimeout(DEADLINE_S)
    text = os.urandom(1 << 20)
    child = start_child(lambda: far.sendall(text), what="the sender", keep=[far.fileno()])
    assert read_all(connected, len(text)) == text
    child.collect(DEADLINE_S)
    sent = 0
    heard = b""
    while len(heard) < len(text):
        readable, writable, _ = select.select(
            [far], [connected] if sent < len(text) else [], [], DEADLINE_S
        )
        assert readable or writable
        if writable:
            sent += connected.send(text[sent : sent + 65536])
        if readable:
            heard += far.recv(1 << 16)
    assert heard == text


def test_what_was_said_before_the_end_is_heard(
    connected: RelayedSocket, listener: socket.socket
) -> None:
    far, _ = listener.accept()
    far.send(b"last words")
    far.close()
    assert read_all(connected, 10) == b"last words"
    assert select.select([connected], [], [], DEADLINE_S)[0]
    assert connected.recv(1) == b""


def test_a_relay_holds_no_more_than_its_buffers(
    connected: RelayedSocket, listener: socket.socket
) -> None:
    far, _ = listener.accept()
    far.setblocking(False)
    sent = 0
    while select.select([], [far], [], 0.5)[1]:
        sent += far.send(bytes(1 << 16))
    assert sent < 1 << 20
    assert len(read_all(connected, sent)) == sent


def test_a_relay_is_nobody_and_has_two_sockets(
    connected: RelayedSocket, listener: socket.socket
) -> None:
    far, _ = listener.accept()
    far.send(b"!")
    read_all(connected, 1)
    (pid,) = relays()
    status = processes.read_status(pid)
    assert status is not None
    assert (set(status.uids), set(status.gids)) == ({65534}, {65534})
    assert not any(status.capabilities)
    links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    kinds = sorted(link.split(":")[0] for link in links)
    # stdin to stderr are /dev/null; the pipe of a child's result has nobody at its end.
    assert kinds == ["/dev/null"] * 3 + ["pipe", "socket", "socket"]


def test_a_closed_relay_ends(connected: RelayedSocket, listener: socket.socket) -> None:
    far, _ = listener.accept()
    (pid,) = relays()
    pidfd = os.pidfd_open(pid)
    connected.close()
    assert select.select([pidfd], [], [], DEADLINE_S)[0]
    os.close(pidfd)
    relay.collect_ended(DEADLINE_S)
    assert relays() == []
    assert far.recv(1) == b""


def test_a_relay_ends_with_its_launcher(tmp_path: Path, listener: socket.socket) -> None:
    def stay() -> None:
        near = connect_by_relay(tmp_path / "sock")
        signal.pause()
        near.close()

    launcher = start_child(stay, what="the launcher")
    far, _ = listener.accept()
    far.settimeout(DEADLINE_S)
    launcher.kill()
    assert far.recv(1) == b""


def test_a_child_has_its_parents_relays_not_for_its_own(
    connected: RelayedSocket, listener: socket.socket, tmp_path: Path
) -> None:
    held_up = os.pidfd_open(os.getpid())  # As of a relay that was killed and does not end.
    relay._ending.append(held_up)

    def work() -> bool:
        # Of its parent's descriptors a child keeps none, so that this number is another's.
        os.dup2(os.open(tmp_path, os.O_PATH), held_up)
        near = connect_by_relay(tmp_path / "sock")
        near.close()
        return os.path.samestat(os.fstat(held_up), os.stat(tmp_path))

    try:
        with start_child(work, what="a child", keep=[listener.fileno()]) as child:
            assert child.collect(DEADLINE_S)
    finally:
        relay._ending.remove(held_up)
        os.close(held_up)
    connected.send(b"still there")


@pytest.mark.parametrize("kind", ["missing", "refused", "full"])
def test_a_connection_that_fails_leaves_no_relay(
    tmp_path: Path, listener: socket.socket, kind: str
) -> None:
    path = tmp_path / ("nothing" if kind == "missing" else "sock")
    waiting = []
    if kind == "refused":
        listener.close()
    if kind == "full":
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(unix_sockets.connect(path))
    with pytest.raises(OSError):
        connect_by_relay(path)
    relay.collect_ended(DEADLINE_S)
    assert relays() == []
    for one in waiting:
        one.close()


def test_the_kernel_is_asked_about_the_socket_behind_a_relay(
    connected: RelayedSocket, listener: socket.socket
) -> None:
    assert waits_for_accept(connected) is True
    far, _ = listener.accept()
    assert waits_for_accept(connected) is False
    far.close()


# --- what blocks


def lingering() -> socket.socket:
    """A connection whose close waits for an hour, since its peer takes nothing (socket(7))."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialler = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    peer.detach()  # It stays open, and unread, as long as this process lives.
    dialler.setblocking(False)
    try:
        while True:
            dialler.send(bytes(4096))
    except BlockingIOError:
        pass
    hour = array.array("i", [1, 3600]).tobytes()
    dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hour)
    return dialler


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.fixture
def frozen(tmp_path: Path, listener: socket.socket) -> Iterator[tuple[RelayedSocket, int]]:
    """A relay, and its pid, that reads what such a connection was passed along with."""
    children = set(relays())
    near = connect_by_relay(tmp_path / "sock")
    assert isinstance(near, RelayedSocket)
    (pid,) = set(relays()) - children
    os.kill(pid, signal.SIGSTOP)  # Else it may have read before the sender has closed its own.
    reader, writer = os.pipe()

    def work() -> None:
        line, _ = listener.accept()
        passed = lingering()
        socket.send_fds(line, [GREETING], [passed.fileno()])
        passed.close()
        os.write(writer, b"!")
        signal.pause()

    with start_child(work, what="the passer", keep=[listener.fileno(), writer]):
        os.close(writer)
        assert os.read(reader, 1) == b"!"
        os.close(reader)
        os.kill(pid, signal.SIGCONT)
        yield near, pid
        near.close()


def test_a_passed_descriptor_freezes_the_relay_and_nobody_else(
    frozen: tuple[RelayedSocket, int],
) -> None:
    near, pid = frozen
    # Nothing is heard: the relay waits in the close, in the midst of its first read.
    assert not select.select([near], [], [], 1.0)[0]
    with pytest.raises(BlockingIOError):
        near.recv(1)
    pidfd = os.pidfd_open(pid)
    near.close()
    assert select.select([pidfd], [], [], DEADLINE_S)[0], "a frozen relay is ended all the same"
    os.close(pidfd)


def test_a_monitor_that_passes_one_is_given_up_in_time(
    frozen: tuple[RelayedSocket, int],
) -> None:
    async def ask() -> int:
        ticks = 0
        asking = asyncio.create_task(Monitor.attach(frozen[0], timeout_s=1))
        while not asking.done():
            await asyncio.sleep(0)
            ticks += 1
        with pytest.raises(Exception, match="did not greet within 1 s"):
            await asking
        return ticks

    assert asyncio.run(ask()) > 100

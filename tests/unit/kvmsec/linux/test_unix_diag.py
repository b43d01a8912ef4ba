"""Whether a connection was accepted, as the kernel sees it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsec.linux import unix_diag
from kvmsec.linux.unix_diag import waits_for_accept


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(8)
        yield listening


def connect(listener: socket.socket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    return client


def test_a_connection_waits_until_it_is_accepted(listener: socket.socket) -> None:
    with connect(listener) as first, connect(listener) as second:
        assert (waits_for_accept(first), waits_for_accept(second)) == (True, True)

        with listener.accept()[0]:
            assert (waits_for_accept(first), waits_for_accept(second)) == (False, True)


def test_many_sockets_are_looked_through(tmp_path: Path) -> None:
    """More than one answer of the kernel's holds."""
    listeners = []
    for number in range(2000):
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / str(number)))
        listening.listen(1)
        listeners.append(listening)
    with connect(listeners[0]) as first, connect(listeners[-1]) as last:
        assert (waits_for_accept(first), waits_for_accept(last)) == (True, True)
    for listening in listeners:
        listening.close()


def test_a_kernel_that_can_not_say_says_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown request is answered as a kernel without unix_diag answers ours."""
    monkeypatch.setattr(unix_diag, "_SOCK_DIAG_BY_FAMILY", 99)

    with connect(listener) as client:
        assert waits_for_accept(client) is None

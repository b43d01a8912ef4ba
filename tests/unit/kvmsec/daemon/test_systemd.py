"""Sockets and readiness, as systemd hands them over: by numbers and variables of the test's."""

import os
import socket
from pathlib import Path

import pytest

from kvmsec.daemon.systemd import BadSockets, notify, take_sockets
from kvmsec.linux.children import run_in_child


def with_sockets(*sockets: socket.socket, count: str | None = None) -> object:
    """What `take_sockets` makes of these, in a process that has them from descriptor 3 on."""

    def take() -> object:
        for index, one in enumerate(sockets):
            os.dup2(one.fileno(), 200 + index)
        for index in range(len(sockets)):
            os.dup2(200 + index, 3 + index, inheritable=True)
        environment = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": count or str(len(sockets)),
            "LISTEN_FDNAMES": "a:b",
            "HOME": "/",
        }
        try:
            taken = take_sockets(environment)
        except BadSockets as error:
            return error.message
        inherited = [one.get_inheritable() for one in taken]
        return [[one.getsockname()[1] for one in taken], inherited, sorted(environment)]

    numbers = [one.fileno() for one in sockets]
    return run_in_child(take, what="taking sockets", timeout_s=20, keep=numbers)


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_the_sockets_are_taken_and_nobody_after_us_takes_them_for_its_own() -> None:
    with listening() as one, listening() as other:
        ports = [one.getsockname()[1], other.getsockname()[1]]
        assert with_sockets(one, other) == [ports, [False, False], ["HOME"]]


def test_sockets_that_were_meant_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    assert take_sockets(environment) == []
    assert environment == {}


def test_what_does_not_listen_is_refused() -> None:
    with socket.socket() as one:
        assert "no TCP socket that listens" in str(with_sockets(one))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        assert "no TCP socket that listens" in str(with_sockets(one))


def test_a_unix_socket_is_no_way_in_from_the_network(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        one.listen()
        assert "no TCP socket that listens" in str(with_sockets(one))


@pytest.mark.parametrize("count", ["0", "-1", "x", "99"])
def test_a_count_that_can_not_be_is_refused(count: str) -> None:
    with listening() as one:
        assert "LISTEN_FDS" in str(with_sockets(one, count=count))


@pytest.mark.parametrize("is_abstract", [False, True])
def test_whoever_supervises_is_told(tmp_path: Path, is_abstract: bool) -> None:
    path = f"@kvmsec-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(path.replace("@", "\0", 1))
        told.settimeout(5)
        notify("READY=1", {"NOTIFY_SOCKET": path})
        assert told.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "/nowhere/at/all", "relative"])
def test_nobody_to_tell_is_no_error(path: str) -> None:
    notify("READY=1", {"NOTIFY_SOCKET": path})

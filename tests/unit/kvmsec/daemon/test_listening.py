"""The daemon's sockets: nobody gets in before the mode is right, and one daemon a root."""

import os
import socket
import stat
from pathlib import Path

import pytest

from kvmsec.daemon.listening import CannotListen, listen_on, local_socket, peer_uid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.sock"


def test_the_local_socket_is_roots_alone_and_goes_with_its_daemon(path: Path) -> None:
    before = os.umask(0)
    try:
        with local_socket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


def test_the_mode_is_right_from_the_first_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at between bind(2) and listen(2): before that nobody can connect."""
    seen: list[int] = []
    real = socket.socket.listen

    def listen(self: socket.socket, *backlog: int) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        real(self, *backlog)

    monkeypatch.setattr(socket.socket, "listen", listen)
    before = os.umask(0)
    try:
        with local_socket(path):
            pass
    finally:
        os.umask(before)
    assert seen
    assert set(seen) == {0o600}


def test_what_a_killed_daemon_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with local_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_second_daemon_is_refused_and_leaves_the_first_alone(path: Path) -> None:
    with local_socket(path):
        with pytest.raises(CannotListen, match="another daemon"), local_socket(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_the_kernel_says_whose_the_peer_is(path: Path) -> None:
    with local_socket(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            assert peer_uid(accepted) == os.geteuid()


def test_every_address_is_listened_on_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen) as raised:
            listen_on([f"127.0.0.2:{port}", f"127.0.0.1:{port}"])
        assert raised.value.hint is not None
        assert "--bind" in raised.value.hint
        (again,) = listen_on([f"127.0.0.2:{port}"])
        again.close()


@pytest.mark.parametrize("bind", ["localhost", "192.0.2.1:1811", "127.0.0.1:x"])
def test_an_address_that_the_node_has_not_is_refused(bind: str) -> None:
    with pytest.raises(CannotListen):
        listen_on([bind])

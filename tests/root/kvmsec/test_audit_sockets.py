"""Whose network the sockets of a process are in, and who may connect to them."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvmsec.audit import sockets
from kvmsec.audit.reading import read_facts
from kvmsec.linux import namespaces

pytestmark = pytest.mark.root


def test_sockets_of_the_host_are_told_from_its_own(run: Callable[..., int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        port = inherited.getsockname()[1]
        pid = run(
            "namespaces.unshare(namespaces.CLONE_NEWNET);"
            "own = socket.socket(socket.AF_INET6); own.listen();"
            "link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); link.bind((0, 0)); ready()",
            pass_fds=[inherited.fileno()],
        )
        facts = read_facts(pid)

    assert facts.sockets is not None
    assert facts.sockets.of_host == (f"tcp 127.0.0.1:{port}",)
    assert len(facts.sockets.tcp_listeners) == 2
    assert facts.sockets.unplaced == 0
    assert facts.namespaces is not None
    assert facts.namespaces.interfaces is not None
    assert "lo" in facts.namespaces.interfaces


def test_a_vsock_socket_is_in_no_table(run: Callable[..., int]) -> None:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError:
        pytest.skip("this kernel has no vsock")
    pid = run("kept = socket.socket(socket.AF_VSOCK); ready()")

    facts = read_facts(pid)
    assert facts.sockets is not None
    assert facts.sockets.unplaced == 1


@pytest.mark.parametrize(
    ("directory_mode", "mode", "is_open"),
    [(0o755, 0o777, True), (0o700, 0o777, False), (0o755, 0o700, False)],
)
@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_who_may_connect_to_a_unix_socket(
    run: Callable[..., int], directory_mode: int, mode: int, is_open: bool, by: str
) -> None:
    """By its path, and where it was bound through a descriptor by a path that is gone."""
    place = Path(f"/run/audit-{by}-{directory_mode:o}-{mode:o}")
    place.mkdir()
    place.chmod(directory_mode)
    name = (
        f"{str(place / 'q')!r}"
        if by == "path"
        else f"'/proc/self/fd/%d/q' % os.open({str(place)!r}, os.O_PATH)"
    )
    pid = run(
        f"s = socket.socket(socket.AF_UNIX); s.bind({name}); s.listen();"
        f"os.chmod({str(place / 'q')!r}, {mode}); ready()"
    )

    facts = read_facts(pid)

    assert facts.sockets is not None
    (listener,) = facts.sockets.unix_listeners
    assert (listener.path, listener.mode, listener.is_open) == (str(place / "q"), mode, is_open)


@pytest.mark.parametrize("name", ["q", "/proc/self/cwd/q"])
def test_a_listener_of_another_network_is_found_by_its_file(
    run: Callable[..., int], name: str
) -> None:
    place = Path(f"/run/audit-apart-{len(name)}")
    place.mkdir()
    pid = run(
        f"os.umask(0); os.chdir({str(place)!r}); namespaces.unshare(namespaces.CLONE_NEWNET);"
        f"s = socket.socket(socket.AF_UNIX); s.bind({name!r}); s.listen(); os.chdir('/'); ready()"
    )

    found = read_facts(pid).sockets

    assert found is not None
    assert [(one.path, one.is_open) for one in found.unix_listeners] == [(str(place / "q"), True)]


def test_a_listener_that_the_kernel_says_nothing_of_is_not_taken_for_closed(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without CONFIG_UNIX_DIAG."""

    def refuse() -> dict[int, sockets.FileId]:
        raise OSError(errno.ENOENT, "no such protocol")

    pid = run(
        f"os.chdir({str(tmp_path)!r}); s = socket.socket(socket.AF_UNIX); s.bind('q'); s.listen();"
        "ready()"
    )
    monkeypatch.setattr(sockets.unix_diag, "listening_files", refuse)

    alone = read_facts(pid).sockets
    told = read_facts(pid, sockets=("/run/p", str(tmp_path / "q"))).sockets

    assert alone is not None and told is not None
    assert [one.is_open for one in alone.unix_listeners] == [None]
    assert [one.path for one in told.unix_listeners] == [str(tmp_path / "q")]


def test_a_listener_is_found_where_its_file_is_said_to_be(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a filesystem with more files than a search looks at."""
    pid = run(
        f"s = socket.socket(socket.AF_UNIX); directory = os.open({str(tmp_path)!r}, os.O_PATH);"
        "s.bind(f'/proc/self/fd/{directory}/q'); s.listen(); ready()"
    )
    monkeypatch.setattr(sockets, "_ENTRIES", 0)

    searched = read_facts(pid).sockets
    told = read_facts(pid, sockets=("/run/elsewhere", str(tmp_path / "q"))).sockets

    assert searched is not None and told is not None
    assert [one.is_open for one in searched.unix_listeners] == [None]
    assert [one.path for one in told.unix_listeners] == [str(tmp_path / "q")]


def test_a_directory_that_goes_while_it_is_searched_is_passed_over(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries_of = sockets._entries_of

    def remove_what_is_listed(path: str) -> list[os.DirEntry[str]]:
        found = entries_of(path)
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "gone").rmdir()
        return found

    with listener_to_be_searched(run, tmp_path) as (pid, socket_file):
        (tmp_path / "gone").mkdir()
        monkeypatch.setattr(sockets, "_entries_of", remove_what_is_listed)
        found = read_facts(pid).sockets

    assert not (tmp_path / "gone").exists()
    assert found is not None
    assert [one.path for one in found.unix_listeners] == [str(socket_file)]


def test_a_socket_that_goes_once_it_is_found_is_open_to_nobody(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of = sockets._file_of

    def remove_it(wanted: sockets.FileId | None, paths: Sequence[str]) -> str | None:
        found = file_of(wanted, paths)
        assert found is not None
        os.unlink(found)
        return found

    with listener_to_be_searched(run, tmp_path) as (pid, _):
        monkeypatch.setattr(sockets, "_file_of", remove_it)
        facts = read_facts(pid)

    assert facts.sockets is not None
    (listener,) = facts.sockets.unix_listeners
    assert (listener.mode, listener.is_open) == (None, False)


@contextlib.contextmanager
def listener_to_be_searched(run: Callable[..., int], place: Path) -> Iterator[tuple[int, Path]]:
    """Who listens at a file that its name doesn't lead to, on a filesystem with few others."""
    namespaces.mount("few", str(place), "tmpfs", 0, "size=1m,mode=755")
    try:
        (place / "below").mkdir()
        pid = run(
            f"s = socket.socket(socket.AF_UNIX); os.chdir({str(place / 'below')!r});"
            "s.bind('q'); s.listen(); os.chdir('/'); ready()"
        )
        yield pid, place / "below" / "q"
    finally:
        namespaces.umount(str(place), namespaces.MNT_DETACH)


def test_an_abstract_socket_is_open_to_its_network_namespace(run: Callable[..., int]) -> None:
    script = "s = socket.socket(socket.AF_UNIX); s.bind('\\0audit\\x1b'); s.listen(); ready()"
    shared = read_facts(run(script)).sockets
    apart = read_facts(run("namespaces.unshare(namespaces.CLONE_NEWNET);" + script)).sockets

    assert shared is not None and apart is not None
    assert [(one.path, one.is_open) for one in shared.unix_listeners] == [("@audit\\x1b", True)]
    assert [one.is_open for one in apart.unix_listeners] == [False]

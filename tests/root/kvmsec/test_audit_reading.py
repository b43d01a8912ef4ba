"""What the audit reads of processes that lie, hide, hold too much or make their reader wait."""

import contextlib
import errno
import grp
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvmsec.audit import reading, sockets
from kvmsec.audit.examination import Subject, examine_all
from kvmsec.audit.process_files import ProcessFiles, ProcessGone
from kvmsec.audit.reading import ProcessChanges, read_facts
from kvmsec.linux import namespaces

pytestmark = pytest.mark.root

UID = 247100
PRELUDE = """
import ctypes, os, resource, socket, stat, sys, threading, time
from pathlib import Path
from kvmsec.linux import namespaces, syscalls
def become(uid):
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
def own_tree(place):
    '''An empty tmpfs as the root, in a mount namespace of its own.'''
    namespaces.unshare(namespaces.CLONE_NEWNS)
    namespaces.mount(None, '/', None, namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.mount('tree', place, 'tmpfs', 0, 'size=1m,mode=755')
    return Path(place)
def ready():
    print('ready', flush=True); time.sleep(600)
"""


@pytest.fixture
def run() -> Iterator[Callable[..., int]]:
    """Runs a script until it says that it is ready; returns its pid, and ends it afterwards."""
    with contextlib.ExitStack() as stack:

        def start(script: str, **options: object) -> int:
            process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + script],
                stdout=subprocess.PIPE,
                text=True,
                **options,  # type: ignore[call-overload]
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return int(process.pid)

        yield start


def test_a_name_can_neither_steer_nor_forge(run: Callable[..., int]) -> None:
    name = b"\x1b[2J\nUid:\t0"
    pid = run(f"Path('/proc/self/comm').write_bytes({name!r}); become({UID}); ready()")

    facts = read_facts(pid)

    assert facts.comm == "\\x1b[2J\\nUid:\\t0"
    assert facts.credentials is not None
    assert (facts.credentials.uids, facts.credentials.gids) == ((UID,), (UID,))


def test_a_thread_that_kept_root_counts(run: Callable[..., int]) -> None:
    """The C library changes all threads, a system call its own only."""
    pid = run(
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start();"
        f"assert ctypes.CDLL(None).syscall(117, {UID}, {UID}, {UID}) == 0;"
        "ready()"
    )

    who = read_facts(pid).credentials

    assert who is not None
    assert (who.uids, who.uid) == ((0, UID), 0)
    assert who.capabilities[2] != 0


def test_its_own_group_is_named_too(run: Callable[..., int]) -> None:
    """The primary group, which is no supplementary one."""
    group = grp.getgrnam("disk").gr_gid
    pid = run(f"os.setgroups([]); os.setresgid({group}, {group}, {group}); ready()")

    who = read_facts(pid).credentials

    assert who is not None
    assert (who.group_names, who.own_group_names) == ((), ("disk",))


def test_a_tracer_of_one_thread_counts(run: Callable[..., int]) -> None:
    pid = run("threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); ready()")
    (thread,) = {int(one) for one in os.listdir(f"/proc/{pid}/task")} - {pid}
    tracer = run(f"assert ctypes.CDLL(None).ptrace(0x4206, {thread}, None, None) == 0; ready()")

    who = read_facts(pid).credentials

    assert who is not None
    assert who.tracer_pid == tracer


def test_a_giant_environment_is_unread_and_not_fine(run: Callable[..., int]) -> None:
    environ = {f"V{number}": "x" * 100_000 for number in range(15)}
    pid = run("ready()", env={**os.environ, **environ})

    facts = read_facts(pid)

    assert facts.secret_variables is None
    assert "more than" in facts.unread["secret_variables"]
    assert facts.arguments is not None


def test_more_descriptors_than_are_looked_at_are_unread(run: Callable[..., int]) -> None:
    pid = run(
        "resource.setrlimit(resource.RLIMIT_NOFILE, (9000, 9000));"
        "kept = [os.dup(0) for _ in range(8500)]; ready()"
    )

    facts = read_facts(pid)

    assert facts.descriptors is None
    assert "8192" in facts.unread["descriptors"]
    # What rests on it is unread as well.
    assert "sockets" in facts.unread


def test_a_filesystem_that_never_answers_is_given_up(
    run: Callable[..., int], tmp_path: Path
) -> None:
    pid = run(
        f"tree = own_tree({str(tmp_path)!r}); (tree / 'hang').mkdir();"
        "fuse = os.open('/dev/fuse', os.O_RDWR);"
        "namespaces.mount('x', str(tree / 'hang'), 'fuse', 0,"
        " f'fd={fuse},rootmode=40000,user_id=0,group_id=0');"
        "os.chroot(tree); os.chdir('/'); ready()"
    )

    facts = read_facts(pid, deadline_s=1.0)

    assert facts.tree is None
    assert "did not end within 1 s" in facts.unread["tree"]
    assert facts.credentials is not None
    assert not [one for one in children() if one.startswith("Z")]


def children() -> list[str]:
    """The states of this process's children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2])
    return found


def test_a_tree_of_its_own_is_walked(run: Callable[..., int], tmp_path: Path) -> None:
    pid = run(
        f"tree = own_tree({str(tmp_path)!r});"
        "(tree / 'open').mkdir(); (tree / 'open').chmod(0o777);"
        "(tree / 'dev').mkdir(); os.mknod(tree / 'dev/mem', stat.S_IFCHR, os.makedev(1, 1));"
        "os.chmod(tree / 'dev/mem', 0o666);"
        "os.mknod(tree / 'dev/vda', stat.S_IFBLK | 0o600, os.makedev(254, 0));"
        "os.mknod(tree / 'dev/null', stat.S_IFCHR | 0o666, os.makedev(1, 3));"
        "(tree / 'su').touch(); (tree / 'su').chmod(0o4755);"
        "(tree / 'link\\x1b').symlink_to('/etc'); (tree / 'proc').mkdir();"
        "namespaces.mount('proc', str(tree / 'proc'), 'proc', 0);"
        "(tree / 'out').mkdir();"
        "namespaces.mount('out', str(tree / 'out'), 'tmpfs', 14, 'size=1m,mode=777');"
        f"os.chroot(tree); os.chdir('/'); become({UID}); ready()"
    )

    tree = read_facts(pid).tree

    assert tree is not None
    assert tree.kind == "own"
    assert tree.writable == ("/open",)
    assert tree.sized == ("/out",)
    assert tree.devices == ("/dev/mem",)
    assert tree.set_uid == ("/su",)
    assert tree.kernel == ("/proc",)
    assert not tree.is_cut


def test_a_tree_that_is_too_large_is_cut_and_said(run: Callable[..., int], tmp_path: Path) -> None:
    pid = run(
        f"tree = own_tree({str(tmp_path)!r});"
        "namespaces.mount('tree', str(tree), 'tmpfs', 0, 'size=64m,mode=755');"
        "[(tree / str(number)).touch() for number in range(20_100)];"
        f"os.chroot(tree); os.chdir('/'); become({UID}); ready()"
    )

    tree = read_facts(pid).tree

    assert tree is not None
    assert tree.is_cut


def test_a_chroot_is_told_from_a_tree_of_its_own(run: Callable[..., int], tmp_path: Path) -> None:
    pid = run(f"os.chroot({str(tmp_path)!r}); ready()")

    tree = read_facts(pid).tree
    assert tree is not None
    assert tree.kind == "chroot"


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


def test_of_more_than_is_shown_the_worst_are_kept(run: Callable[..., int], tmp_path: Path) -> None:
    """Files, listeners, devices and addresses, of each one that is bad, behind forty others."""
    place = Path("/run/audit-many")
    place.mkdir()
    pid = run(
        f"os.chdir({str(place)!r}); resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "kept = []\n"
        "def keep(number, is_open):\n"
        "    file = os.open(f'disk{number}', os.O_RDWR | os.O_CREAT); os.ftruncate(file, 4096)\n"
        "    os.chmod(f'disk{number}', 0o666 if is_open else 0o600)\n"
        "    s = socket.socket(socket.AF_UNIX); s.bind(f'sock{number}'); s.listen()\n"
        "    os.chmod(f'sock{number}', 0o666 if is_open else 0o600)\n"
        "    t = socket.create_server(('0.0.0.0' if is_open else '127.0.0.1', 0))\n"
        "    kept.extend((file, s, t))\n"
        "for number in range(40): keep(number, False)\n"
        "keep(40, True)\n"
        f"tree = own_tree({str(tmp_path)!r}); (tree / 'dev').mkdir()\n"
        "for number in range(40):\n"
        "    os.mknod(tree / f'dev/tty{number}', stat.S_IFCHR | 0o666, os.makedev(4, number))\n"
        "os.mknod(tree / 'dev/mem', stat.S_IFCHR, os.makedev(1, 1))\n"
        "os.chmod(tree / 'dev/mem', 0o666)\n"
        "os.chroot(tree); os.chdir('/'); ready()"
    )

    facts = read_facts(pid)

    assert facts.descriptors and facts.sockets and facts.tree
    assert facts.descriptors.files[0].path == str(place / "disk40")
    assert facts.sockets.unix_listeners[0].path == str(place / "sock40")
    assert facts.sockets.tcp_listeners[0].startswith("tcp 0.0.0.0:")
    assert facts.tree.devices[0] == "/dev/mem"
    shown = (facts.descriptors.files, facts.sockets.unix_listeners, facts.tree.devices)
    assert {len(one) for one in shown} == {32}


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


def test_one_that_becomes_another_program_all_the_time_is_given_up(
    run: Callable[..., int], tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.write_text('#!/bin/sh\nexec "$0"\n')
    loop.chmod(0o755)
    with subprocess.Popen([loop], start_new_session=True) as process:  # Without our terminal.
        try:
            with pytest.raises(ProcessChanges):
                read_facts(process.pid)
            reports = examine_all([Subject(process.pid)])
            (report,) = [one for one in reports if one.pid == process.pid]
            assert report.score == 10.0
            told = {one.code: one for one in report.findings}
            assert "changes while it is read" in told["root-tree"].message
            assert {one.code for one in told.values() if one.state == "sealed"} == {"terminal"}
        finally:
            process.kill()


def test_one_that_ends_while_it_is_read_is_gone_whoever_has_its_pid() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        with ProcessFiles(process.pid) as files:
            assert files.is_there()
            process.kill()
            process.wait()
            successor = _fork_with_pid(process.pid)
            try:
                assert not files.is_there()
                with pytest.raises(ProcessLookupError):
                    files.read("status")
                assert Path(f"/proc/{process.pid}/status").exists()
            finally:
                os.kill(successor, signal.SIGKILL)
                os.waitpid(successor, 0)
        with pytest.raises(ProcessGone):
            read_facts(process.pid)


def _fork_with_pid(pid: int) -> int:
    """A process with a pid that has just become free: the next one that the kernel would give."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    assert child == pid
    return child


def test_one_that_ends_in_the_midst_of_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read next of it: an audit of all is not to end with one that ended."""
    with subprocess.Popen(["sleep", "600"]) as process:

        def end_it(files: ProcessFiles) -> Callable[[object], None]:
            process.kill()
            process.wait()
            return lambda who: None

        monkeypatch.setattr(reading, "_sharers", end_it)
        with pytest.raises(ProcessGone):
            read_facts(process.pid)


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessGone):
            read_facts(process.pid)

"""What the audit reads of processes that lie, hide, hold too much or make their reader wait."""

import contextlib
import grp
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.audit import reading
from kvmsec.audit.examination import Subject, examine_all
from kvmsec.audit.process_files import ProcessFiles, ProcessGone
from kvmsec.audit.reading import ProcessChanges, read_facts

pytestmark = pytest.mark.root

UID = 247100


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

"""How checks are run and what each makes of what it finds; the host itself is in tests/kvm."""

import asyncio
import errno
import os
import re
import select
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from attrs import evolve

from hypervisor import huge_pages
from hypervisor.cgroup_mounts import Mount
from hypervisor.cgroups import Hierarchy
from hypervisor.seccomp import Filter, NoFilter
from kvmsec.agent import Finding, InstanceInfo, InstanceState
from kvmsec.config import CgroupSettings, Config, ConfinementSettings, LimitSettings
from kvmsec.errors import NoCluster
from kvmsec.linux import command, syscalls
from kvmsec.linux.errors import CommandFailed
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.node import doctor
from kvmsec.node.doctor import CHECKS, accounts, examine, kernel, places
from kvmsec.node.doctor.subject import Answer, Check, Subject, ok, warning
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.messages import Nothing
from uidpool.ranges import EMPTY


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Paths(tmp_path))


@pytest.fixture
def subject(host: Host) -> Subject:
    return Subject(host, Config(), cluster=None)


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what asks for root is told so: the checks of these tests need none."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def run(host: Host, *looks: Any) -> list[Finding]:
    checks = tuple(
        Check(f"check-{number}", f"item {number}", look) for number, look in enumerate(looks)
    )
    return asyncio.run(examine(host, checks))


def fine(subject: Subject) -> Iterator[Answer]:
    yield ok("fine")


# How checks are run


def test_codes_are_stable_words_and_unique() -> None:
    codes = [check.code for check in CHECKS]

    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_without_root_one_finding_says_so(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    (finding,) = run(host, fine)

    assert (finding.code, finding.severity) == ("root", "error")
    assert finding.hint


@pytest.mark.usefixtures("as_root")
def test_answers_come_in_the_checks_order_with_code_item_and_node(host: Host) -> None:
    def slow(subject: Subject) -> Iterator[Answer]:
        select.select([], [], [], 0.1)
        yield warning("slow", "wait")

    first, second = run(host, slow, fine)

    assert first == Finding("check-0", "warning", "item 0", "slow", "wait", os.uname().nodename)
    assert (second.code, second.severity, second.message) == ("check-1", "ok", "fine")


def raises_unexpectedly(subject: Subject) -> Iterator[Answer]:
    raise KeyError("surprise")


def crashes(subject: Subject) -> Iterator[Answer]:
    os.kill(os.getpid(), signal.SIGSEGV)
    yield ok("never said")


def raises_a_fault(subject: Subject) -> Iterator[Answer]:
    yield ok("seen before")
    raise NoCluster


def meets_a_system_error(subject: Subject) -> Iterator[Answer]:
    yield ok(Path("/no such file").read_text())


@pytest.mark.usefixtures("as_root")
def test_a_check_that_fails_is_an_error_of_its_own_and_ends_no_other(host: Host) -> None:
    found = run(host, raises_unexpectedly, crashes, fine, meets_a_system_error)

    assert [finding.severity for finding in found] == ["error", "error", "ok", "error"]
    assert "KeyError" in found[0].message
    assert "signal 11" in found[1].message
    assert "/no such file" in found[3].message
    assert all(finding.hint for finding in found if finding.severity == "error")


@pytest.mark.usefixtures("as_root")
def test_a_fault_keeps_its_hint_and_what_was_found_before_it(host: Host) -> None:
    before, fault = run(host, raises_a_fault)

    assert before.message == "seen before"
    assert (fault.message, fault.hint) == (NoCluster().message, NoCluster().hint)


@pytest.mark.usefixtures("as_root")
def test_a_check_that_hangs_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(subject: Subject) -> Iterator[Answer]:
        signal.pause()
        yield ok("never said")

    monkeypatch.setattr(doctor, "DEADLINE_S", 0.2)

    hung, other = run(host, hangs, fine)

    assert (hung.severity, other.severity) == ("error", "ok")
    assert "0.2 s" in hung.message


def test_who_asks_a_daemon_waits_until_checks_that_hang_are_ended() -> None:
    rounds = -(-len(CHECKS) // doctor.AT_ONCE)
    assert CALLS["node.doctor"].deadline_s(Nothing()) > rounds * doctor.DEADLINE_S


@pytest.mark.usefixtures("as_root")
def test_what_a_check_does_to_itself_ends_with_it(host: Host) -> None:
    def moves(subject: Subject) -> Iterator[Answer]:
        os.chdir("/proc")
        os.umask(0o777)
        yield ok("moved")

    place = Path.cwd()
    run(host, moves)

    assert Path.cwd() == place


# The kernel


def test_a_processor_of_another_kind_is_refused(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.1", machine="aarch64"))

    (answer,) = kernel.check_system(subject)

    assert answer.severity == "error"
    assert "aarch64" in answer.message


@pytest.mark.parametrize(
    ("call", "name"), [("set_mount_attributes", "mount_setattr"), ("clone3", "clone3")]
)
def test_a_missing_system_call_is_named(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(syscalls, call, refuse)

    (answer,) = kernel.check_system_calls(subject)

    assert (answer.severity, answer.message) == ("error", f"not available: {name}")


_YAMA = ("_YAMA", kernel.check_ptrace, "kernel.yama.ptrace_scope", "1")
_IO_URING = ("_IO_URING", kernel.check_io_uring, "kernel.io_uring_disabled", "1")
_LOGGED = ("_LOGGED", kernel.check_call_log, "kernel.seccomp.actions_logged", "kill_process")


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        *((one, "0\n", "0") for one in (_YAMA, _IO_URING)),
        *((one, value, None) for one in (_YAMA, _IO_URING) for value in ("1\n", "2\n", None)),
        (_LOGGED, "kill_process kill_thread trap errno log\n", "has errno, kill_thread, log, trap"),
        (_LOGGED, "kill_process kill_thread\n", "has kill_thread"),
        *((_LOGGED, value, None) for value in ("kill_process\n", "\n", None)),
    ],
)
def test_what_a_kernel_could_forbid_and_does_not_is_a_warning_with_its_sysctl(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: tuple[str, Any, str, str],
    value: str | None,
    told: str | None,
) -> None:
    """`told` is what the warning says of the setting; None where there is nothing to warn of."""
    constant, look, name, fix = setting
    path = tmp_path / "setting"
    if value is not None:
        path.write_text(value)
    monkeypatch.setattr(kernel, constant, path)

    (answer,) = look(subject)

    assert answer.severity == ("ok" if told is None else "warning")
    if told is not None:
        assert f"{name} {told})" in answer.message
        assert f"sysctl -w {name}={fix}," in (answer.hint or "")


@pytest.mark.parametrize(
    ("mounts", "tolerated", "severity"),
    [
        ((), (), "error"),
        ((), ("cgroup",), "ok"),
        ((), ("cgroup-memory", "cgroup-pids"), "error"),
    ],
)
def test_missing_control_groups_are_an_error_unless_tolerated(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    mounts: tuple[Mount, ...],
    tolerated: tuple[str, ...],
    severity: str,
) -> None:
    monkeypatch.setattr(Hierarchy, "detect", lambda: Hierarchy(mounts))
    first, *others = kernel.check_cgroups(tolerating(subject, tolerated))

    assert first.severity == severity
    assert "no control group hierarchy is mounted" in first.message
    assert [answer.severity for answer in others] == ["ok"]
    if severity == "error":
        assert first.hint is not None
        assert 'may_be_missing = ["cgroup' in first.hint


def test_a_limit_of_the_nodes_own_wants_its_controller_whatever_is_tolerated(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hierarchy, "detect", lambda: Hierarchy(()))
    config = Config(
        limits=LimitSettings(cpu_quota_percent=100),
        confinement=ConfinementSettings(may_be_missing=("cgroup",)),
    )

    first, _ = kernel.check_cgroups(evolve(subject, config=config))

    assert first.severity == "error"
    assert "cgroup-cpu" in first.message
    assert first.hint is not None
    assert "may_be_missing" not in first.hint
    assert "ask for no limit of cpu" in first.hint


def test_a_pool_of_huge_pages_wants_its_controller_as_a_start_does(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hierarchy, "detect", lambda: Hierarchy(()))
    monkeypatch.setattr(huge_pages, "pools_mib", lambda: (2,))

    first, _ = kernel.check_cgroups(tolerating(subject, ("cgroup-memory", "cgroup-pids")))

    assert first.severity == "error"
    assert "cgroup-hugetlb" in first.message


_UNIT = "kvmsec.slice/kvmsec-instances.service"


@pytest.mark.parametrize(
    ("says", "parent", "severity", "told", "hint"),
    [
        (None, None, "ok", "below kvmsec (kvmsec's own: cgroup.parent is not set)", ""),
        (None, "a/b", "ok", "below a/b (cgroup.parent), and systemd does not", ""),
        ("yes active", f"{_UNIT}/x", "ok", f"{_UNIT}/x (cgroup.parent), which systemd has", ""),
        ("yes inactive", _UNIT, "warning", "which systemd has not delegated", "start the unit"),
        ("no active", _UNIT, "warning", "which systemd has not delegated", "start the unit"),
        ("yes active", None, "warning", "below kvmsec (kvmsec's own", "install kvmsec-instances"),
        ("yes active", "a/b", "warning", "below a/b (cgroup.parent), which", "start the unit"),
        ("", _UNIT, "ok", "whether systemd has delegated that could not be asked", ""),
    ],
)
def test_a_parent_that_systemd_has_not_delegated_is_warned_of(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    says: str | None,
    parent: str | None,
    severity: str,
    told: str,
    hint: str,
) -> None:
    def run(argv: Sequence[str], *, timeout_s: float) -> command.Output:
        assert argv[-1] == "kvmsec-instances.service"
        if not says:
            raise CommandFailed(argv, 1, b"Failed to connect to bus")
        delegate, state = says.split()
        return command.Output(0, f"Delegate={delegate}\nActiveState={state}\n".encode(), b"")

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(kernel, "mounted", lambda: [Mount("/sys/fs/cgroup", 2, frozenset())])
    monkeypatch.setattr(kernel, "_SYSTEMD", tmp_path if says is not None else tmp_path / "none")

    config = Config(cgroup=CgroupSettings(parent=parent))
    (answer,) = kernel.check_cgroup_parent(evolve(subject, config=config))

    assert answer.severity == severity
    assert told in answer.message
    assert (answer.hint or "").startswith(hint)
    assert (_UNIT in (answer.hint or "")) == bool(hint)


def test_where_no_control_groups_are_mounted_nothing_is_said_of_their_parent(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "mounted", lambda: [])
    assert list(kernel.check_cgroup_parent(subject)) == []


def tolerating(subject: Subject, pieces: tuple[str, ...]) -> Subject:
    """The same node, whose configuration lets these pieces of confinement be missing."""
    assert subject.config is not None
    confinement = evolve(subject.config.confinement, may_be_missing=pieces)
    return evolve(subject, config=evolve(subject.config, confinement=confinement))


@pytest.mark.parametrize(("tolerated", "severity"), [((), "error"), (("seccomp",), "warning")])
def test_a_missing_filter_is_an_error_and_a_warning_where_it_is_tolerated(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    tolerated: tuple[str, ...],
    severity: str,
) -> None:
    def missing() -> Filter:
        raise NoFilter("libseccomp.so.2: cannot open shared object file")

    monkeypatch.setattr(kernel, "find_filter", missing)
    (answer,) = kernel.check_filter(tolerating(subject, tolerated))

    assert answer.severity == severity
    assert "libseccomp.so.2" in answer.message
    assert answer.hint and "apt-get install libseccomp2" in answer.hint


@pytest.mark.parametrize(
    ("tolerated", "severity"), [((), "error"), (("session-keyring",), "warning")]
)
def test_a_session_keyring_that_is_refused_is_an_error_and_a_warning_where_it_is_tolerated(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    tolerated: tuple[str, ...],
    severity: str,
) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(kernel, "leave_session_keyring", refuse)
    (answer,) = kernel.check_keyring(tolerating(subject, tolerated))

    assert answer.severity == severity
    assert answer.message.startswith("no new session keyring can be had (Operation not permitted)")
    assert answer.hint and "allow it keyctl" in answer.hint
    assert ("may_be_missing" in answer.hint) == (severity == "error")


@pytest.mark.parametrize(
    ("are_known", "told"),
    [(True, "a new one for each process that asks"), (False, "there are no keys here")],
)
def test_a_session_keyring_of_ones_own_is_well_and_so_is_a_kernel_without_keys(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, are_known: bool, told: str
) -> None:
    monkeypatch.setattr(kernel, "leave_session_keyring", lambda: None)
    monkeypatch.setattr(kernel, "are_known", lambda: are_known)

    (answer,) = kernel.check_keyring(subject)

    assert (answer.severity, answer.message.startswith(told)) == ("ok", True)


# Places


@pytest.mark.parametrize(
    ("free_mib", "inodes", "severity"),
    [
        (1000, 100_000, "ok"),
        (20, 100_000, "warning"),
        (1, 100_000, "error"),
        (1000, 500, "warning"),
        (1000, 3, "error"),
    ],
)
def test_room_and_inodes_that_run_out_are_seen(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int,
    inodes: int,
    severity: str,
) -> None:
    give_room(monkeypatch, f_bavail=free_mib * 256, f_files=10**6, f_favail=inodes)

    assert {answer.severity for answer in places.check_space(subject)} == {severity}


def test_a_file_system_that_counts_no_inodes_has_enough(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_room(monkeypatch, f_files=0, f_favail=0)

    assert {answer.severity for answer in places.check_space(subject)} == {"ok"}


def test_a_read_only_place_is_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    give_room(monkeypatch, f_flag=os.ST_RDONLY)

    assert {answer.severity for answer in places.check_space(subject)} == {"error"}


def give_room(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    room = {"f_flag": 0, "f_bavail": 10**6, "f_frsize": 4096, "f_files": 9, "f_favail": 10**6}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**room | changes))


@pytest.mark.parametrize(
    ("year", "severity"), [(1970, "error"), (2024, "error"), (2026, "ok"), (2107, "error")]
)
def test_a_clock_that_cannot_be_right_is_an_error(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, year: int, severity: str
) -> None:
    monkeypatch.setattr(time, "time", datetime(year, 6, 1, tzinfo=UTC).timestamp)

    (answer,) = places.check_clock(subject)

    assert answer.severity == severity


def test_a_clock_behind_the_clusters_birth_is_a_warning(subject: Subject) -> None:
    made = Cluster(
        name="demo",
        uuid=UUID(int=1),
        uid_pool=EMPTY,
        draining=EMPTY,
        security_model=None,
        nodes=(Member("here", uuid=UUID(int=2), address="here", role=Role.CANDIDATE),),
        master=UUID(int=2),
        created_at=datetime(2099, 1, 1, tzinfo=UTC),
    )

    (answer,) = places.check_clock(evolve(subject, cluster=made))

    assert answer.severity == "warning"


# Uids and instances


def test_before_there_is_a_cluster_the_pools_checks_are_warnings(subject: Subject) -> None:
    (answer,) = accounts.check_pool_users(subject)

    assert answer.severity == "warning"
    assert answer.hint and "kvmsec cluster init" in answer.hint


def test_an_instance_that_is_not_as_it_should_be_is_a_warning(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [
        InstanceInfo(name="fine", state=InstanceState.RUNNING),
        InstanceInfo(name="gone", state=InstanceState.CRASHED, reason="killed by SIGKILL"),
        InstanceInfo(name="odd", state=InstanceState.UNKNOWN, reason="not JSON"),
        InstanceInfo(name="half", state=InstanceState.STARTING, reason="interrupted"),
    ]
    monkeypatch.setattr(accounts, "describe_all", lambda host: known)

    *warnings, summary = accounts.check_instances(subject)

    assert [answer.severity for answer in warnings] == ["warning"] * 3
    assert "killed by SIGKILL" in warnings[0].message
    assert summary.message == "4 known, 1 running"

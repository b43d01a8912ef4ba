"""The checks against this very host: what they say of it, and that they leave nothing behind."""

import asyncio
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import evolve

from firewall.guard import Firewall
from hypervisor import tiny
from hypervisor.closure import Closure, find_closure
from hypervisor.features import Features, find_qemu, probe
from kvmsec.agent import Finding
from kvmsec.cluster import operations
from kvmsec.linux import processes
from kvmsec.linux.children import start_child
from kvmsec.node import provisioning
from kvmsec.node.doctor import accounts, examine, filters, places
from kvmsec.node.doctor.subject import Answer, Subject
from kvmsec.node.host import Host
from kvmsec.node.local import LocalNode
from kvmsec.node.trial import NOBODY, TrialFailed, boot_tiny_guest
from kvmsec.paths import Paths
from uidpool import usage
from uidpool.ranges import UidRanges
from uidpool.steps import carry_out
from uidpool.waiting import WaitingClaims

pytestmark = pytest.mark.kvm

POOL = UidRanges.of((246000, 246004))
WORDS_OF_QEMU = "qemu-system"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Paths(tmp_path / "root"))


def by_code(findings: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.code, []).append(finding)
    return found


def state_of_the_host(tag: str = "doctor") -> dict[str, Any]:
    """Everything that a check could leave behind."""
    listing = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout
    folders = ("/run", "/var/lib", "/var/log", "/tmp", "/var/tmp", "/dev/shm", "/etc")
    groups = Path("/sys/fs/cgroup").glob(f"**/{tag}/**/")
    return {
        "rules": listing,
        "tables": [
            path.read_bytes() if (path := Path("/proc/net", name)).exists() else b""
            for name in ("ip_tables_names", "ip6_tables_names")
        ],
        "files": sorted(str(path) for folder in folders for path in Path(folder).rglob("*")),
        "processes": sorted(processes.pids()),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "groups": sorted(map(str, groups)),
        "namespaces": sorted(os.readlink(entry.path) for entry in os.scandir("/proc/self/ns")),
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def test_it_says_all_there_is_to_say_and_leaves_nothing_behind(host: Host) -> None:
    before = state_of_the_host(host.paths.tag)

    found = by_code(asyncio.run(examine(host)))

    assert state_of_the_host(host.paths.tag) == before
    for code in ("system", "system-calls", "namespaces", "privileges", "qemu", "tcg"):
        assert [finding.severity for finding in found[code]] == ["ok"], found[code]
    assert found["packet-filter"][0].severity == "ok"
    assert found["pool"][0].severity == found["reaper"][0].severity == "warning"
    every = [finding for findings in found.values() for finding in findings]
    assert all(finding.hint for finding in every if finding.severity != "ok")


def test_an_idle_host_is_examined_in_seconds(host: Host) -> None:
    """About one second on two idle cores; the limit is for busy ones."""
    started = time.monotonic()
    asyncio.run(examine(host))

    assert time.monotonic() - started < 10


# The trial


@pytest.fixture(scope="module")
def qemu() -> tuple[Path, Features]:
    binary = find_qemu(None, None)
    return binary, probe(binary, credentials=NOBODY)


def files_of(qemu: tuple[Path, Features], accelerator: Literal["kvm", "tcg"]) -> Closure:
    return find_closure(qemu[0], accelerator=accelerator, credentials=NOBODY)


def test_a_guest_that_never_speaks_is_given_up_and_ended(
    qemu: tuple[Path, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = tmp_path / "mute.rom"
    mute.write_bytes(b"\xf4" * 65536)  # hlt, and interrupts are off
    monkeypatch.setattr(tiny, "rom_path", lambda: mute)
    before = state_of_the_host()

    with pytest.raises(TrialFailed, match=r"did not speak within 0.5 s"):
        boot_tiny_guest(files_of(qemu, "tcg"), qemu[1], "tcg", timeout_s=0.5)

    assert state_of_the_host() == before


def test_qemus_own_words_say_why_it_ended(
    qemu: tuple[Path, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "odd.rom"
    odd.write_bytes(b"\xf4" * 65535)  # no BIOS of a pc has such a size
    monkeypatch.setattr(tiny, "rom_path", lambda: odd)

    with pytest.raises(TrialFailed, match=r"QEMU said: .*[Bb][Ii][Oo][Ss]"):
        boot_tiny_guest(files_of(qemu, "tcg"), qemu[1], "tcg", timeout_s=5)


def test_the_guest_ends_with_whoever_tries_it(
    qemu: tuple[Path, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = tmp_path / "mute.rom"
    mute.write_bytes(b"\xf4" * 65536)
    monkeypatch.setattr(tiny, "rom_path", lambda: mute)
    closure = files_of(qemu, "tcg")
    child = start_child(
        lambda: boot_tiny_guest(closure, qemu[1], "tcg", timeout_s=60), what="a trial"
    )
    with child:
        pidfd = os.pidfd_open(wait_for_qemu())
        os.kill(child.pid, signal.SIGKILL)

        assert_ends(pidfd)


def wait_for_qemu() -> int:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for pid in processes.pids():
            status = processes.read_status(pid)
            if status is not None and status.name.startswith(WORDS_OF_QEMU):
                return pid
    pytest.fail("no QEMU was started")


def assert_ends(pidfd: int) -> None:
    try:
        assert select.select([pidfd], [], [], 5)[0], "QEMU outlived who had started it"
    finally:
        os.close(pidfd)


# Configuration, definitions, directories: root's, so these need root


def answers(look: Any, host: Host) -> list[Answer]:
    return list(look(Subject.of(host)))


def test_a_definition_that_cannot_be_used_is_named_with_its_fix(host: Host) -> None:
    place = host.paths.definitions
    place.mkdir(parents=True)
    (place / "good.toml").write_text("memory_mib = 64\n")
    (place / "bad.toml").write_text("memory_mib = -1\n")
    (place / "BAD NAME.toml").write_text("")
    (place / "broken.toml").write_text("memory_mib = [\n")

    *errors, summary = answers(places.check_definitions, host)

    assert [answer.severity for answer in errors] == ["error"] * 3
    assert all(answer.hint for answer in errors)
    assert summary.message.startswith("1 in ")


def test_each_piece_that_may_be_missing_is_told_though_the_host_has_it(host: Host) -> None:
    host.paths.etc.mkdir(parents=True)
    host.paths.config.write_text('[confinement]\nmay_be_missing = ["seccomp", "cgroup-pids"]\n')

    *warnings, summary = answers(places.check_configuration, host)

    assert [(one.severity, one.message) for one in warnings] == [
        ("warning", "it lets instances start without seccomp"),
        ("warning", "it lets instances start without cgroup-pids"),
    ]
    assert summary.severity == "ok"


def test_a_bad_configuration_is_one_error_and_the_rest_is_examined(host: Host) -> None:
    host.paths.etc.mkdir(parents=True)
    host.paths.config.write_text("[qemu]\npith = 3\n")

    found = by_code(asyncio.run(examine(host)))

    (finding,) = found["configuration"]
    assert finding.severity == "error"
    assert "pith" in finding.message
    assert found["tcg"][0].severity == "ok"
    assert found["packet-rules"][0].severity == "warning"


@pytest.fixture
def made(host: Host) -> Iterator[Paths]:
    host.paths.make_directories()
    yield host.paths
    for directory in (host.paths.uid_leases.parent, host.paths.uid_state.parent):
        shutil.rmtree(directory)


def test_directories_that_others_could_read_or_own_are_found(host: Host, made: Paths) -> None:
    assert [answer.severity for answer in answers(places.check_directories, host)] == ["ok"]
    made.var.chmod(0o755)
    os.chown(made.instances, 1000, 1000)

    opened, owned = answers(places.check_directories, host)

    assert (opened.severity, opened.hint) == ("warning", f"chmod 0700 {made.var}")
    assert (owned.severity, owned.hint) == ("error", f"chown -h root:root {made.instances}")


# A pool


@pytest.fixture
def pool(host: Host) -> Iterator[Host]:
    """A cluster with a pool of users, and its packet rules in force."""

    async def make() -> None:
        node = LocalNode(host.paths.root)
        await provisioning.apply(provisioning.plan(host.paths, POOL))
        await node.reconcile()
        await operations.init(host.store, node, "demo", uid_pool=POOL)
        await node.close()

    async def end() -> None:
        node = LocalNode(host.paths.root)
        await operations.destroy(host.store, node)
        await provisioning.remove(host.paths, POOL)
        await node.close()

    asyncio.run(make())
    yield host
    asyncio.run(end())


def test_a_pool_in_order_is_counted_and_its_rules_proved(pool: Host) -> None:
    found = by_code(asyncio.run(examine(pool)))

    for code in ("pool", "reaper", "uids", "packet-rules"):
        assert [finding.severity for finding in found[code]] == ["ok"], found[code]
    assert "5 free" in found["uids"][0].message
    assert "proved by a packet" in found["packet-rules"][0].message


def test_rules_that_somebody_took_away_are_an_error(pool: Host) -> None:
    Firewall("auto", pool.paths.tag).remove()

    found = answers(filters.check_rules, pool)
    asyncio.run(apply_rules(pool))

    assert {answer.severity for answer in found} == {"error"}
    assert any(answer.hint and "firewall apply" in answer.hint for answer in found)


async def apply_rules(host: Host) -> None:
    node = LocalNode(host.paths.root)
    await node.apply_rules()
    await node.close()


def test_a_user_that_became_unfit_is_an_error(pool: Host) -> None:
    subprocess.run(["usermod", "--shell", "/bin/sh", "kvmsec-246001"], check=True)

    (answer,) = answers(accounts.check_pool_users, pool)
    subprocess.run(["usermod", "--shell", "/usr/sbin/nologin", "kvmsec-246001"], check=True)

    assert answer.severity == "error"
    assert "246001" in answer.message


def test_a_quarantined_uid_is_a_warning_with_its_reason(pool: Host) -> None:
    dirty = WaitingClaims(
        pool.paths.uid_leases,
        pool.paths.uid_state,
        root=str(pool.paths.root),
        clean=lambda uid: evolve(usage.inspect(uid), incomplete="somebody is in the way"),
    )
    lease = dirty.draw(POOL, instance="web", generation="0" * 16)
    dirty.release(lease.key)

    warned, counted = answers(accounts.check_claims, pool)
    carry_out(pool.claims.retrying(lease.uid), pool.claims.take)

    assert warned.severity == "warning"
    assert "somebody is in the way" in warned.message
    assert warned.hint == f"kvmsec uids release {lease.uid}"
    assert "4 free" in counted.message and "1 quarantined" in counted.message


def test_a_lease_that_cannot_be_read_is_an_error(pool: Host) -> None:
    broken = pool.paths.uid_leases / "246002"
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text("not JSON")

    unreadable, _ = answers(accounts.check_claims, pool)
    carry_out(pool.claims.retrying(246002), pool.claims.take)

    assert unreadable.severity == "error"
    assert "246002" in unreadable.message

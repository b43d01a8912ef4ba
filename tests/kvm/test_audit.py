"""The audit of real QEMUs: kvmsec's own, one that root started by hand, and one as libvirt has it.

What other launchers set up is done here by hand, so that their packages aren't needed.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny
from kvmsec.audit.discovery import find_qemus
from kvmsec.audit.examination import Report, Subject, examine, examine_all
from kvmsec.audit.process_files import ProcessGone
from kvmsec.linux import command
from tests.kvm.test_cli import Shell

pytestmark = pytest.mark.kvm

DEADLINE_S = 30.0
PROGRAM = "qemu-system-x86_64"
# What Debian's libvirt has, without its package: its user, and how it runs a guest.
LIBVIRT_UID = 64055
# What a pool instance lacks: a bound of CPU time, which nobody asked for; KVM where there is none.
MISSING_AT_MOST = {"cgroup-cpu", "accelerator"}


def exposed(report: Report) -> dict[str, float]:
    return {one.code: one.exposure for one in report.findings if one.exposure}


def finding(report: Report, code: str) -> Any:
    return next(one for one in report.findings if one.code == code)


@pytest.fixture
def start(accelerator_in_use: str) -> Iterator[Callable[..., int]]:
    """Starts a QEMU by hand; returns its pid once its machine is there, and ends it."""
    with contextlib.ExitStack() as stack:

        def begin(
            *arguments: str,
            program: str = PROGRAM,
            accel: str = "",
            within: Sequence[str] = (),
            **options: Any,
        ) -> int:
            machine = ["-M", "pc", "-accel", accel or accelerator_in_use, "-m", "1", "-nodefaults"]
            ready = stack.enter_context(Ready())
            qemu = subprocess.Popen(
                [
                    *(*within, program, *machine, "-bios", str(tiny.rom_path())),
                    *(*ready.arguments, *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[ready.theirs.fileno()],
                **options,
            )
            stack.callback(qemu.wait)
            stack.callback(qemu.kill)
            ready.wait()
            return qemu.pid

        yield begin


class Ready:
    """A monitor on a descriptor, by whose reply one knows that the machine has been made."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(DEADLINE_S)
        self.arguments = (
            *("-chardev", f"socket,id=ready,fd={self.theirs.fileno()}"),
            *("-mon", "chardev=ready,mode=control"),
        )

    def __enter__(self) -> "Ready":
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()

    def wait(self) -> None:
        self.theirs.close()
        self.ours.sendall(b'{"execute": "qmp_capabilities"}\n')
        heard = b""
        while b'"return"' not in heard:
            chunk = self.ours.recv(4096)
            assert chunk, "QEMU ended before it was ready"
            heard += chunk


# kvmsec's own --------------------------------------------------------------------------------


def test_an_instance_of_the_pool_is_sealed_but_for_what_is_named(lab: Any) -> None:
    pid = lab.start().pid
    report = examine(Subject(pid, "web"))
    lab.stop()

    assert report.unread == {}
    assert exposed(report).keys() <= MISSING_AT_MOST
    emulation = 0.5 if lab.accelerator == "tcg" else 0.0
    assert report.score <= 0.1 + emulation, exposed(report)
    assert report.rating in ("PERFECT", "SAFE")
    assert (report.name, report.pid) == ("web", pid)
    assert report.uid in lab.pool


def test_a_pool_uid_is_refused_by_the_canary_too(lab: Any) -> None:
    pid = lab.start().pid
    tried = finding(examine(Subject(pid, "web"), with_canary=True), "packet-rules")
    lab.run(lambda node: node.remove_rules(force=True))
    without = examine(Subject(pid, "web"))
    sent = finding(examine(Subject(pid, "web"), with_canary=True), "packet-rules")
    lab.stop()

    assert (tried.state, tried.exposure) == ("sealed", 0.0)
    assert finding(without, "packet-rules").state == "exposed"
    assert "was sent" in sent.message
    # The empty network namespace is the other lock.
    assert 0 < sent.exposure < 0.3


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_either_backend_s_rules_are_seen(make_lab: Any, backend: str) -> None:
    lab = make_lab(f'[firewall]\nbackend = "{backend}"\n')
    pid = lab.start().pid
    rules = finding(examine(Subject(pid, "web")), "packet-rules")
    lab.stop()

    assert rules.state == "sealed", rules
    assert ("nft table" if backend == "nftables" else "ip6tables table") in rules.message


def test_two_of_one_user_share_their_uid_and_root_is_root(lab: Any) -> None:
    for name in ("a", "b"):
        lab.start(name, security_model="user", security_domain=lab.domain)
    lab.start("root", security_model="none")
    reports = {one.name: one for one in examine_all()}
    for name in reports:
        lab.stop(name)

    assert sorted(reports) == ["a", "b", "root"]
    assert "1 other QEMU" in finding(reports["a"], "uid-shared").message
    assert exposed(reports["root"])["uid"] == 1.0
    assert reports["root"].score > reports["a"].score > 0.5
    # Root without a capability, in the same jail.
    assert "capabilities" not in exposed(reports["root"])


# Others' -------------------------------------------------------------------------------------


def test_root_s_bare_qemu_is_open(start: Any) -> None:
    report = examine(Subject(start("-display", "none")))

    assert report.unread == {}
    assert report.score >= 9.0, exposed(report)
    assert report.rating in ("UNSAFE", "DANGEROUS")


def test_what_is_asked_for_by_arguments_is_told_without_a_secret(start: Any) -> None:
    place = Path("/run/open-to-all")
    place.mkdir()
    place.chmod(0o755)
    disk = place / "disk"
    disk.touch()
    os.truncate(disk, 1 << 20)
    disk.chmod(0o666)
    pid = start(
        *("-name", "shop", "-vnc", "127.0.0.1:77", "-qmp", "tcp:127.0.0.1:5001,server=on,wait=off"),
        *("-monitor", f"unix:{place}/monitor,server=on,wait=off"),
        *("-object", "secret,id=s,data=hunter2", "-drive", f"file={disk},format=raw,if=virtio"),
        umask=0,
        env={"API_TOKEN": "hunter2", **os.environ},
    )

    report = examine(Subject(pid))

    assert report.score == 10.0
    assert report.name == "shop"
    told = {one.code: one.message for one in report.findings}
    assert "tcp 127.0.0.1:5001" in told["tcp-listeners"]
    assert "tcp 127.0.0.1:5977" in told["tcp-listeners"]
    assert "-vnc (without a password)" in told["tcp-listeners"]
    assert str(place / "monitor") in told["unix-listeners"]
    assert f"may write to {disk}" in told["disk-paths"]
    assert "-object (data)" in told["secrets"]
    assert "API_TOKEN" in told["environment"]
    assert "hunter2" not in json.dumps(report.plain())
    shutil.rmtree(place)


# Another uid, a mount namespace with a small /dev, nothing else; "$@" is QEMU.
AS_LIBVIRT = """
mount -t tmpfs -o nosuid,noexec,size=64k,mode=755 devfs /dev
umask 0
mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; mknod -m 666 /dev/full c 1 7
mknod -m 666 /dev/urandom c 1 9; mknod -m 666 /dev/kvm c 10 232
umask 0002
exec setpriv --reuid "$0" --regid "$0" --clear-groups -- "$@"
"""
WITHIN_LIBVIRT = ("unshare", "--mount", "sh", "-c", AS_LIBVIRT, str(LIBVIRT_UID))
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_a_qemu_as_libvirt_has_it_stands_in_between(start: Any) -> None:
    """One shared uid, the host's tree and namespaces but for the mounts, QEMU's own filter."""
    first, second = (
        start("-display", "none", "-sandbox", SANDBOX, within=WITHIN_LIBVIRT) for _ in range(2)
    )

    report = examine(Subject(first))

    found = exposed(report)
    assert 3.0 < report.score < 7.5, found
    assert found.keys() >= {
        *("uid-shared", "bounding-set", "namespace-net", "namespace-pid", "namespace-ipc"),
        *("root-tree", "writable-paths", "packet-rules", "cgroup-memory", "dumpable"),
    }
    assert found.keys().isdisjoint({"uid", "capabilities", "no-new-privs", "sandbox"})
    assert found.keys().isdisjoint({"namespace-mnt", "devices"})
    assert f"uid {LIBVIRT_UID}" in finding(report, "uid").message
    assert examine(Subject(second)).score == report.score


def test_a_uid_of_its_own_with_rules_for_ipv4_alone_is_half_a_lock(
    start: Any,
) -> None:
    subprocess.run(
        ["iptables-legacy", "-A", "OUTPUT", "-m", "owner", "--uid-owner", "30005", "-j", "DROP"],
        check=True,
    )
    try:
        pid = start("-display", "none", accel="tcg", user=30005, group=30005, extra_groups=[])
        report = examine(Subject(pid))
    finally:
        subprocess.run(["iptables-legacy", "-F", "OUTPUT"], check=True)

    rules = finding(report, "packet-rules")
    assert "over IPv6" in rules.message and "IPv4" not in rules.message
    assert 0.3 < rules.exposure < 0.8
    assert {"seccomp", "sandbox", "no-new-privs"} <= exposed(report).keys()
    assert "uid-shared" not in exposed(report)


def test_a_program_that_was_replaced_is_told(start: Any, tmp_path: Path) -> None:
    copy = tmp_path / "bin/qemu-kvm"
    copy.parent.mkdir()
    # It looks for its modules beside itself, that of TCG among them.
    (tmp_path / "lib").symlink_to("/usr/lib")
    shutil.copy(shutil.which(PROGRAM) or "", copy)
    pid = start("-display", "none", program=str(copy))
    copy.unlink()

    assert pid in find_qemus()
    assert exposed(examine(Subject(pid)))["executable"] > 0


def test_one_that_ends_is_gone_and_not_taken_for_its_successor(start: Any) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        other.kill()
    with pytest.raises(ProcessGone):
        examine(Subject(other.pid))


# The command ---------------------------------------------------------------------------------


def test_the_command_knows_instances_by_name_pid_and_all(lab: Any, start: Any) -> None:
    shell = Shell(lab.root, lab.accelerator)
    lab.configure('[confinement]\nmay_be_missing = ["cgroup"]\n')
    pid = lab.start().pid
    bare = start("-display", "none")

    (by_name,) = shell.json("audit", "web")
    (by_pid,) = shell.json("audit", "--pid", str(pid))
    everything = shell.json("audit", "--all")
    table = shell.run("audit").stdout.splitlines()
    page = shell.run("audit", "web").stdout
    lab.stop()

    assert by_name == by_pid == everything[1]
    assert [one["pid"] for one in everything] == [bare, pid]
    assert [one["name"] for one in everything] == [PROGRAM[:15], "web"]
    assert by_name["score"] == pytest.approx(
        min(10, sum(one["exposure"] for one in by_name["findings"])), abs=0.01
    )
    assert [line.split()[:2] for line in table[1:]] == [
        [PROGRAM[:15], str(bare)],
        ["web", str(pid)],
    ]
    assert "Overall exposure of web: " in page
    assert "lets a start do without: cgroup" in page


def test_a_threshold_is_status_3_above_it(lab: Any) -> None:
    shell = Shell(lab.root, lab.accelerator)
    lab.start()
    shell.run("audit", "web", "--threshold", "2")
    shell.run("audit", "web", "--threshold", "0", status=3)
    shell.run("audit", "--threshold", "0", "--json", status=3)
    lab.stop()
    gone = shell.run("audit", "web", status=1)
    assert gone.stderr.startswith("kvmsec: there is no instance web\nhint: ")


def test_who_is_not_root_is_told_what_could_not_be_read(start: Any, tmp_path: Path) -> None:
    pid = start("-display", "none")
    script = (
        "import os, json; os.setgroups([]); os.setresgid(65534,65534,65534);"
        "os.setresuid(65534,65534,65534);"
        "from kvmsec.audit.examination import Subject, examine;"
        f"print(json.dumps(examine(Subject({pid})).plain(), default=str))"
    )
    done = command.run([sys.executable, "-c", script], timeout_s=DEADLINE_S)

    told = json.loads(done.stdout)
    assert {"descriptors", "tree", "secret_variables", "coverage"} <= told["unread"].keys()
    states = {one["code"]: one["state"] for one in told["findings"]}
    assert states["devices"] == states["packet-rules"] == states["root-tree"] == "unknown"
    assert states["uid"] == states["seccomp"] == "exposed"
    assert told["score"] >= 9.0


def test_a_stopped_process_does_not_hold_the_audit_up(start: Any) -> None:
    pid = start("-display", "none")
    os.kill(pid, signal.SIGSTOP)
    report = examine(Subject(pid))
    os.kill(pid, signal.SIGCONT)

    assert report.unread == {}

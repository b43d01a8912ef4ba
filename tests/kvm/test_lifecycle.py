"""An instance's whole life, from its start to the release of what it had."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kvmsec.agent import InstanceState
from kvmsec.errors import AlreadyRunning, UnknownInstance
from kvmsec.linux import processes
from kvmsec.linux.processes import ProcessStatus

pytestmark = pytest.mark.kvm

MODELS: dict[str, dict[str, Any]] = {
    "none": {"security_model": "none"},
    "user": {"security_model": "user", "security_domain": "guestkeeper"},
    "pool": {},
}
NAMESPACES = ("mnt", "net", "ipc", "uts", "pid", "cgroup")


@pytest.mark.parametrize("model", MODELS)
def test_a_guest_lives_its_whole_life(lab, model):
    disk = lab.disk()
    started = lab.start(disks=[{"path": str(disk)}], **MODELS[model])
    assert started.state is InstanceState.RUNNING
    assert (started.name, started.security_model) == ("web", model)
    assert (started.accelerator, started.memory_mib, started.vcpus) == (lab.accelerator, 1, 1)
    check_whose_it_is(lab, started, model)
    check_confinement(lab, started)
    check_files(lab, started)

    with lab.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
        assert line.ask(b"3") == "SECTOR 3"
        assert line.ask(b"w") == "WROTE 3 00000001"
        assert disk.read_bytes()[3 * 512 : 4 * 512] == b"KVMSEC-W00000001" * 32
        os.pwrite(descriptor := os.open(disk, os.O_WRONLY), b"from the outside", 512)
        os.close(descriptor)
        assert line.ask(b"1r").startswith("SECTOR 1")
        assert line.hear_line().startswith("READ 1 from the outside")
        check_it_is_shown(lab, started)
        check_reboot(lab, started, line)

    stopped = lab.stop(force=False)
    assert (stopped.state, stopped.reason) == (InstanceState.STOPPED, "powered down")
    assert not processes.read_status(started.pid)
    assert not lab.leftovers()
    assert not lab.instances()
    said = lab.run(lambda node: node.log("web"))
    assert "stopped: powered down" in said.kvmsec
    assert "ECHO hello" in said.serial
    assert lab.rules() == str(lab.pool)


def check_whose_it_is(lab: Any, started: Any, model: str) -> None:
    if model == "none":
        assert (started.uid, started.user) == (0, "root")
    elif model == "user":
        assert (started.uid, started.user) == (lab.domain_uid, lab.domain)
        assert lab.rules() == f"{lab.pool},{lab.domain_uid}"
    else:
        assert started.uid in lab.pool
        assert started.user == f"kvmsec-{started.uid}"
    held = [(one.uid, one.instance) for one in lab.leases()]
    assert held == ([(started.uid, "web")] if model == "pool" else [])


def check_confinement(lab: Any, started: Any) -> None:
    """What the kernel shows of the process, all its threads included."""
    proc = Path(f"/proc/{started.pid}")
    own = (started.uid,) * 4
    for task in (proc / "task").iterdir():
        seen = processes.read_status(f"{started.pid}/task/{task.name}")
        assert isinstance(seen, ProcessStatus)
        assert (seen.uids, seen.gids, seen.groups) == (own, own, ())
        assert seen.capabilities == (0,) * 5
        assert seen.no_new_privs and seen.seccomp == 2
    assert (proc / "environ").read_bytes() == b"PATH=/usr/bin\0LC_ALL=C\0"
    assert [line.split()[4:6] for line in _lines(proc / "limits", "Max core")] == [["1", "1"]]
    assert _lines(proc / "status", "Umask") == ["Umask:\t0077"]
    for kind in NAMESPACES:
        assert os.readlink(proc / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
    assert [line.split(":")[0].strip() for line in _lines(proc / "net/dev", "")[2:]] == ["lo"]
    assert lab.groups(), "it is in no control group"
    assert all(str(started.pid) in Path(group, "cgroup.procs").read_text() for group in _own(lab))
    assert os.getsid(started.pid) == started.pid
    check_tree(proc)
    check_descriptors(lab, proc)


def _own(lab: Any) -> list[str]:
    return [group for group in lab.groups() if group.endswith("/vm-web")]


def check_tree(proc: Path) -> None:
    """Of the node's tree it sees what it runs from, and may write to its output alone."""
    mounts = [line.split() for line in _lines(proc / "mountinfo", "")]
    writable = [(fields[4], set(fields[5].split(","))) for fields in mounts]
    assert [place for place, options in writable if "rw" in options] == ["/output"]
    assert all({"nosuid"} < options for _, options in writable)
    assert not {"etc", "home", "proc", "root", "run", "sys", "tmp", "var"} & set(
        os.listdir(proc / "root")
    )


def check_descriptors(lab: Any, proc: Path) -> None:
    """Files and devices that it has open: what it was lent, and what it opened in its own tree."""
    opened = {os.readlink(entry) for entry in (proc / "fd").iterdir()}
    kinds = ("anon_inode:", "socket:", "pipe:", "/memfd:")
    wanted = {
        "/dev/null",
        "/output/serial.log",
        str(lab.paths.instance("web").output / "qemu.log"),
        str(lab.root / "disk.raw"),
        *(["/dev/kvm"] if lab.accelerator == "kvm" else []),
    }
    assert {target for target in opened if not target.startswith(kinds)} == wanted


def check_files(lab: Any, started: Any) -> None:
    """Everything below the root is root's alone, but for the place of the instance's output."""
    output = lab.paths.instance("web").output
    # Directories that lead to kvmsec's own: what other programs have below a root of / too.
    parents = {lab.root / place for place in ("etc", "run", "var", "var/lib", "var/log")}
    instances_own = {output, output / "serial.log"}
    for path in lab.root.rglob("*"):
        status = path.lstat()
        owner = started.uid if path in instances_own else 0
        assert (status.st_uid, status.st_gid) == (owner, owner), path
        if path not in parents:
            mode = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
            assert stat.S_IMODE(status.st_mode) == mode, path
    assert {path.name for path in output.iterdir()} == {"qemu.log", "serial.log"}


def check_it_is_shown(lab: Any, started: Any) -> None:
    listed = lab.instances()
    assert list(listed) == ["web"]
    assert listed["web"].pid == started.pid
    assert listed["web"].state is InstanceState.RUNNING
    assert listed["web"].resident_bytes > 1 << 20
    details = lab.run(lambda node: node.info("web")).details
    assert [use["path"] for use in details["images"]] == [str(lab.root / "disk.raw")]
    assert "-sandbox" in details["command_line"]
    log = lab.run(lambda node: node.log("web"))
    assert "KVMSEC-TINY up" in log.serial and "WROTE 3" in log.serial
    assert "-sandbox" in log.kvmsec


def check_reboot(lab: Any, started: Any, line: Any) -> None:
    lab.run(lambda node: node.reboot("web"))
    assert line.hear_line().startswith("KVMSEC-TINY up")
    assert line.ask(b"w") == "WROTE 1 00000001", "the counts began anew"
    now = lab.run(lambda node: node.info("web"))
    assert (now.pid, now.uid, now.started_at) == (started.pid, started.uid, started.started_at)


def _lines(path: Path, start: str) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(start)]


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_rules_of_each_backend_carry_a_start_and_go_with_the_cluster(make_lab, backend):
    lab = make_lab(f'[firewall]\nbackend = "{backend}"\n')
    pooled, owned = lab.start("pooled"), lab.start("owned", **MODELS["user"])
    shown = lab.run(lambda node: node.show_rules())
    assert (shown["backend"], shown["families"]) == (backend, ["ipv4", "ipv6"])
    assert shown["uids"] == f"{lab.pool},{lab.domain_uid}"
    assert shown["dropped_packets"] > 0, "the canaries"
    assert {one.severity for one in lab.run(lambda node: node.verify_rules())} == {"ok"}
    assert pooled.uid != owned.uid
    lab.stop("owned")
    assert lab.rules() == str(lab.pool)
    lab.stop("pooled")


def test_an_instance_without_a_cluster_runs_as_a_user_under_rules_that_go_with_it(lab):
    lab.destroy()
    lab.start(**MODELS["user"])
    assert lab.rules() == str(lab.domain_uid)
    lab.stop()
    assert lab.rules() == ""


def test_a_deaf_guest_is_ended_after_the_timeout_and_a_forced_stop_does_not_ask(lab):
    for timeout_s, force, reason in ((2.0, False, "did not power down"), (60.0, True, "as asked")):
        lab.start()
        with lab.line() as line:
            assert line.ask(b"h") == "HANG"
        assert reason in lab.stop(force=force, timeout_s=timeout_s).reason
        assert not lab.leftovers()


def test_what_is_stopped_may_be_stopped_again_and_what_is_unknown_may_not(lab):
    definition = lab.paths.definition("web")
    definition.touch(mode=0o600)
    lab.start()
    lab.stop()
    assert lab.stop().state is InstanceState.STOPPED
    assert lab.instances()["web"].state is InstanceState.STOPPED, "it has a definition"
    definition.unlink()
    for act in ("stop", "info", "reboot"):
        with pytest.raises(UnknownInstance, match="there is no instance web"):
            lab.run(lambda node, act=act: getattr(node, act)("web"))
    with pytest.raises(UnknownInstance):
        lab.run(lambda node: node.log("never"))
    assert not lab.leftovers()


def test_what_runs_is_not_started_again(lab):
    started = lab.start()
    with pytest.raises(AlreadyRunning):
        lab.start()
    assert lab.instances()["web"].pid == started.pid
    lab.stop()


def test_a_guest_that_floods_its_serial_line_fills_nothing_and_hides_nothing(make_lab):
    lab = make_lab("[limits]\nlog_kib = 16\n")
    lab.start()
    with lab.line() as line:
        line.say(b"f")
        # Not each of them whole: QEMU's serial port drops what can't be taken as fast as it comes.
        assert sum("FLOOD" in line.hear_line() for _ in range(1200)) > 1000
        output = lab.paths.instance("web").output
        room = os.statvfs(output)
        assert room.f_blocks * room.f_frsize <= (16 + 64) * 1024
        assert (output / "serial.log").stat().st_size <= 16 * 1024
        assert room.f_bfree == 0, "the flood has filled its own place"
        shown = lab.run(lambda node: node.log("web"))
        assert 0 < len(shown.serial) <= 16 * 1024 and "FLOOD" in shown.serial
    # QEMU's own words have room that the guest can't take from them.
    os.kill(lab.instances()["web"].pid, 15)
    with pytest.raises(UnknownInstance):
        lab.run(wait_for_its_end)
    kept = lab.run(lambda node: node.log("web"))
    assert "terminating on signal 15" in kept.qemu
    assert "FLOOD" in kept.serial
    assert lab.paths.instance_output("web").stat().st_size < (16 + 64) * 1024 + 64


async def wait_for_its_end(node: Any) -> None:
    async for event in node.events():
        if event.state is InstanceState.CRASHED:
            break
    await node.stop("web")  # It is known to have crashed until somebody stops it.
    await node.info("web")

"""`kvmsec instance`: what is asked of the node, and how its answers are shown."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest

from hypervisor.machine import Disk, Limits, Nic
from kvmsec.agent import InstanceInfo, InstanceState
from kvmsec.cli.instance import start
from kvmsec.cli.params import SECURITY_MODEL
from kvmsec.errors import AlreadyRunning
from kvmsec.model.security import SecurityModel


def running(**changes: Any) -> InstanceInfo:
    facts: dict[str, Any] = {
        "name": "web",
        "state": InstanceState.RUNNING,
        "pid": 4711,
        "uid": 20001,
        "user": "kvmsec-20001",
        "security_model": "pool",
        "accelerator": "kvm",
        "memory_mib": 64,
        "vcpus": 1,
        "started_at": datetime.now(UTC) - timedelta(seconds=125),
        "resident_bytes": 13 * 2**20,
        "cpu_s": 0.5,
        "details": {"qemu_version": "7.2.9", "machine": {"kernel": Path("/k")}},
    }
    return InstanceInfo(**{**facts, **changes})


@pytest.fixture
def started(run: Any, node: Any) -> Any:
    """Start `web` with these arguments; the definition that the node was given."""
    node.infos = [running()]

    def invoke(*arguments: str) -> Any:
        result = run("instance", "start", "web", *arguments)
        assert result.exit_code == 0, result.stderr
        ((what, (definition,)),) = node.calls
        assert what == "start"
        return definition

    return invoke


# Starting ------------------------------------------------------------------------------------


def test_a_start_says_what_was_started(run: Any, node: Any) -> None:
    node.infos = [running()]

    result = run("instance", "start", "web", "--memory", "64")

    assert result.stdout == "web running: pid 4711, uid 20001 (kvmsec-20001), accelerator kvm\n"
    assert result.stderr == ""


HOSTILE = "\x1b]0;owned\x07\x1b[2J"


def test_what_another_node_says_of_an_instance_does_not_steer_the_terminal(
    run: Any, node: Any
) -> None:
    node.infos = [running(name=f"web{HOSTILE}", accelerator=HOSTILE, user=HOSTILE)]
    node.stopped = InstanceInfo(name=f"web{HOSTILE}", state=InstanceState.STOPPED, reason=HOSTILE)

    told = [run("instance", "start", "web", "--memory", "64"), run("instance", "stop", "web")]

    for result in told:
        assert result.exit_code == 0
        assert "owned" in result.output
        assert "\x1b" not in result.output


def test_a_time_that_another_node_made_up_ends_no_listing(run: Any, node: Any) -> None:
    far = datetime.max.replace(tzinfo=timezone(-timedelta(hours=23)))
    node.infos = [running(), running(name="odd", started_at=far)]

    for arguments in (["list", "--json"], ["list"], ["info", "odd"], ["info", "odd", "--json"]):
        result = run("instance", *arguments)
        assert (result.exit_code, result.stderr) == (0, "")


def test_a_command_line_that_is_none_is_shown_all_the_same(run: Any, node: Any) -> None:
    node.infos = [running(details={"command_line": [1, None]})]

    assert run("instance", "info", "web").exit_code == 0


def test_a_start_warns_of_root_and_of_emulation(run: Any, node: Any) -> None:
    node.infos = [running(security_model="none", accelerator="tcg", uid=0, user="root")]

    result = run("instance", "start", "web", "--memory", "64")

    assert result.exit_code == 0
    first, second = result.stderr.splitlines()
    assert first.startswith("kvmsec: warning: web runs as root (security model none)")
    assert second.startswith("kvmsec: warning: web is emulated (tcg)")


def test_options_alone_make_a_machine(started: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    definition = started(
        *("--memory", "64", "--vcpus", "2", "--machine", "q35", "--cpu", "max"),
        *("--disk", "a.img,format=qcow2", "--disk", "/b.img,readonly=on"),
        *("--nic", "bridge=br0,mac=52:54:00:00:00:01"),
        *("--kernel", "vmlinuz", "--initrd", "/initrd", "--append", "console=ttyS0"),
        *("--accel", "tcg", "--security-model", "user", "--security-domain", "alice"),
        *("--qemu", "/usr/bin/qemu-system-x86_64"),
    )

    machine = definition.machine
    assert (machine.name, machine.memory_mib, machine.vcpus) == ("web", 64, 2)
    assert (machine.machine, machine.cpu, machine.accelerator) == ("q35", "max", "tcg")
    assert machine.disks == (
        Disk(tmp_path / "a.img", format="qcow2"),
        Disk(Path("/b.img"), readonly=True),
    )
    assert machine.nics == (Nic(bridge="br0", mac="52:54:00:00:00:01"),)
    assert (machine.kernel, machine.initrd) == (tmp_path / "vmlinuz", Path("/initrd"))
    assert (machine.append, machine.qemu) == ("console=ttyS0", Path("/usr/bin/qemu-system-x86_64"))
    assert definition.security_model is SecurityModel.USER
    assert definition.security_domain == "alice"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spec.toml", 'memory_mib = 64\nvcpus = 2\n[[disks]]\npath = "/a"\n'),
        ("spec.json", '{"memory_mib": 64, "vcpus": 2, "disks": [{"path": "/a"}]}'),
    ],
)
def test_options_win_over_a_file(
    started: Any, monkeypatch: Any, tmp_path: Path, name: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)

    machine = started("--spec", name, "--memory", "96").machine

    assert (machine.memory_mib, machine.vcpus, machine.disks) == (96, 2, (Disk(Path("/a")),))


def test_huge_pages_are_an_option(run: Any, started: Any) -> None:
    machine = started("--memory", "96", "--hugepages", "2M").machine

    assert (machine.memory_mib, machine.hugepages) == (96, "2M")
    assert run("instance", "start", "web", "--hugepages", "4M").exit_code == 2


@pytest.mark.parametrize("quota", ["150", "150%"])
def test_limits_are_options_of_their_own(started: Any, quota: str) -> None:
    limits = started("--cpu-weight", "50", "--cpu-quota", quota, "--io-weight", "7").machine.limits

    assert limits == Limits(cpu_weight=50, cpu_quota_percent=150, io_weight=7)


def test_an_option_of_the_limits_leaves_the_files_others(started: Any, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text("[limits]\ncpu_weight = 20\noom_score_adjust = 300\n")

    limits = started("--spec", str(spec), "--cpu-weight", "30").machine.limits

    assert limits == Limits(cpu_weight=30, oom_score_adjust=300)


@pytest.mark.root
def test_the_kept_definition_is_taken_when_nothing_else_is_said(started: Any, root: Path) -> None:
    (root / "etc/kvmsec/instances/web.toml").write_text('memory_mib = 77\nfirmware = "/rom"\n')

    machine = started().machine

    assert (machine.memory_mib, machine.firmware) == (77, Path("/rom"))


@pytest.mark.root
def test_options_win_over_the_kept_definition(started: Any, root: Path) -> None:
    (root / "etc/kvmsec/instances/web.toml").write_text('memory_mib = 77\nfirmware = "/rom"\n')

    machine = started("--memory", "96").machine

    assert (machine.memory_mib, machine.firmware) == (96, Path("/rom"))


@pytest.mark.root
def test_no_definition_at_all_is_an_error_that_names_the_file(
    run: Any, node: Any, root: Path
) -> None:
    result = run("instance", "start", "web")

    assert result.exit_code == 1
    place = root / "etc/kvmsec/instances/web.toml"
    assert result.stderr.startswith(f"kvmsec: {place}: there is no such file\nhint: write it")
    assert node.calls == []


@pytest.mark.root
def test_no_definition_of_one_that_runs_by_options_says_so(run: Any, root: Path) -> None:
    (root / "run/kvmsec/instances/web").mkdir(parents=True)

    result = run("instance", "start", "web")

    assert result.exit_code == 1
    assert "hint: web was started without it: `kvmsec instance info web`" in result.stderr


def test_every_fault_of_a_file_is_told(run: Any, node: Any, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text('memory_mib = 0\ncolour = "red"\nsecurity_model = "magic"\n')

    result = run("instance", "start", "web", "--spec", str(spec))

    assert result.exit_code == 1
    for word in ("memory_mib", "colour", "security_model", str(spec)):
        assert word in result.stderr
    assert node.calls == []


def test_a_missing_file_is_named_with_what_it_should_be(
    run: Any, node: Any, tmp_path: Path
) -> None:
    result = run("instance", "start", "web", "--spec", str(tmp_path / "none.toml"))

    assert result.exit_code == 1
    place = f"{tmp_path}/none.toml"
    assert result.stderr.startswith(f"kvmsec: {place}: No such file or directory\nhint: --spec ")


def test_a_refused_start_is_told(run: Any, node: Any) -> None:
    node.error = AlreadyRunning("web")

    result = run("instance", "start", "web", "--memory", "64")

    assert result.exit_code == 1
    assert result.stderr.startswith("kvmsec: the instance web runs already\nhint: ")


def test_the_choices_are_those_that_there_are() -> None:
    assert list(SECURITY_MODEL.choices) == [model.value for model in SecurityModel]
    (accelerators,) = (option.type for option in start.params if option.name == "accelerator")
    assert isinstance(accelerators, click.Choice)
    assert list(accelerators.choices) == ["kvm", "tcg", "auto"]


# Stopping and the like -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], ("web", 60.0, False)),
        (["--timeout", "2.5"], ("web", 2.5, False)),
        (["--force"], ("web", 60.0, True)),
    ],
)
def test_a_stop_waits_as_long_as_it_is_told(
    run: Any, node: Any, arguments: list[str], asked: tuple[Any, ...]
) -> None:
    result = run("instance", "stop", "web", *arguments)

    assert result.stdout == "web stopped (powered down)\n"
    assert node.calls == [("stop", asked)]


def test_a_reboot_is_confirmed(run: Any, node: Any) -> None:
    assert run("instance", "reboot", "web").stdout == "web was reset\n"
    assert node.calls == [("reboot", ("web",))]


# Looking -------------------------------------------------------------------------------------


def test_the_list_for_people(run: Any, node: Any) -> None:
    node.infos = [
        running(),
        InstanceInfo(name="old", state=InstanceState.CRASHED, reason="killed by \x1b[5m"),
    ]

    lines = run("instance", "list").stdout.splitlines()

    assert lines[0].split() == [
        *("NAME", "STATE", "PID", "UID", "USER", "MODEL", "ACCELERATOR", "MEMORY", "UPTIME")
    ]
    assert lines[1].split() == [
        *("web", "running", "4711", "20001", "kvmsec-20001", "pool", "kvm", "64", "MiB"),
        *("2m", "05s"),
    ]
    assert lines[2].split()[:6] == ["old", "crashed", "(killed", "by", "\\x1b[5m)", "-"]


def test_the_list_for_machines(run: Any, node: Any) -> None:
    node.infos = [running(started_at=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))]

    assert json.loads(run("instance", "list", "--json").stdout) == [
        {
            "name": "web",
            "state": "running",
            "reason": None,
            "pid": 4711,
            "uid": 20001,
            "user": "kvmsec-20001",
            "security_model": "pool",
            "accelerator": "kvm",
            "memory_mib": 64,
            "vcpus": 1,
            "started_at": "2030-01-02T03:04:05+00:00",
            "resident_bytes": 13631488,
            "cpu_s": 0.5,
            "autostart": False,
        }
    ]


def test_no_instances_are_an_empty_document(run: Any, node: Any) -> None:
    assert json.loads(run("instance", "list", "--json").stdout) == []


def test_info_says_all_that_the_list_says_and_more(run: Any, node: Any) -> None:
    node.infos = [running()]

    listed = json.loads(run("instance", "list", "--json").stdout)[0]
    told = json.loads(run("instance", "info", "web", "--json").stdout)

    assert listed.items() <= told.items()
    assert told["machine"] == {"kernel": "/k"}


def test_info_for_people(run: Any, node: Any) -> None:
    node.infos = [running()]

    lines = run("instance", "info", "web").stdout.splitlines()

    assert {"uptime: 2m 05s", "machine.kernel: /k", "resident bytes: 13631488 (13.0 MiB)"} <= {
        " ".join(line.split()) for line in lines
    }


def test_an_unknown_instance_is_status_1(run: Any, node: Any) -> None:
    result = run("instance", "info", "web")

    assert result.exit_code == 1
    assert result.stderr.startswith("kvmsec: there is no instance web\nhint: ")

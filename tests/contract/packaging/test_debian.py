"""What the Debian package is made of: scripts that sh takes, units that call what there is."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from kvmsec.cli.main import kvmsec
from uidpool import provision

CHECKOUT = Path(__file__).parents[3]
PACKAGING = CHECKOUT / "packaging"
SCRIPTS = [
    *(PACKAGING / name for name in ("build-deb", "build-python")),
    *(PACKAGING / "debian" / name for name in ("postinst", "prerm", "postrm")),
    *(
        CHECKOUT / "vm-images" / "l1" / name
        for name in ("build-tree", "build-debian", "build-smoke", "in-tree", "smoke-init")
    ),
]
UNITS = sorted((PACKAGING / "systemd").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_posix_sh(script: Path) -> None:
    done = subprocess.run(["dash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_calls_commands_that_there_are(unit: Path) -> None:
    for line in re.findall(r"^Exec\w+=(.*)$", unit.read_text(), re.MULTILINE):
        program, *words = shlex.split(line)
        if program in ("/bin/true", "/bin/kill"):
            continue
        assert program == "/usr/bin/kvmsec"
        command: click.Command = kvmsec
        for word in words:
            assert isinstance(command, click.Group), line
            found = command.get_command(click.Context(command), word)
            assert found is not None, line
            command = found


def test_no_unit_that_ends_takes_instances_along() -> None:
    for unit in UNITS:
        text = unit.read_text()
        if "Slice=kvmsec.slice" in text:
            assert "KillMode=process" in text, unit.name


def test_the_instances_group_is_the_one_that_systemd_delegates() -> None:
    config = (PACKAGING / "debian" / "kvmsec.toml").read_text()
    assert 'parent = "kvmsec.slice/kvmsec-instances.service"' in config
    unit = (PACKAGING / "systemd" / "kvmsec-instances.service").read_text()
    assert "Delegate=yes" in unit
    assert "Slice=kvmsec.slice" in unit


def test_the_users_that_come_with_it_are_those_that_provisioning_makes() -> None:
    lines = (PACKAGING / "debian" / "sysusers.conf").read_text().splitlines()
    reaper = f'u {provision.REAPER} - "{provision.REAPER_GECOS}" {provision.HOME} {provision.SHELL}'
    assert reaper in lines
    assert f'u kvmsec-front - "kvmsec front" {provision.HOME} {provision.SHELL}' in lines


def test_every_field_of_the_control_file_is_filled_by_the_build() -> None:
    control = (PACKAGING / "debian" / "control.in").read_text()
    build = (PACKAGING / "build-deb").read_text()
    fields = set(re.findall(r"@[A-Z_]+@", control))
    assert fields == {"@VERSION@", "@PYTHON@", "@INSTALLED_SIZE@"}
    assert all(field in build for field in fields)

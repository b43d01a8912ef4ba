"""What another node may name here: decided from settings and where paths lead, all at once."""

from pathlib import Path
from typing import Any

import pytest

from hypervisor.spec import machine_from
from kvmsec.config import RemoteSettings
from kvmsec.daemon.remote_orders import (
    Place,
    RemoteOrderRefused,
    Unfollowable,
    find_problems,
    require_allowed,
)

SETTINGS = RemoteSettings(
    disk_folders=(Path("/srv/disks"), Path("/dev/vg0")),
    kernel_folders=(Path("/srv/boot"),),
    firmware_folders=(Path("/usr/share/OVMF"),),
    qemu_programs=(Path("/usr/bin/qemu-system-x86_64"),),
    bridges=("br0",),
    taps=("tap7",),
)
LINKS = {
    "/srv/disks/link": "/etc/shadow",
    "/srv/disks/inside": "/srv/disks/other.raw",
    "/dev/vg0/root": "/dev/dm-3",
    "/srv/boot/vmlinuz": "/dev/dm-3",
}


def follow(path: Path) -> Place:
    """Where paths lead on a host of the test's."""
    if path == Path("/srv/disks/missing"):
        raise Unfollowable("it can't be followed: No such file or directory")
    target = Path(LINKS.get(str(path), str(path)))
    return Place(target, path.parent, is_block_device=str(target).startswith("/dev/dm-"))


def problems(**keys: Any) -> list[str]:
    machine = machine_from({"name": "web", **keys}, source="the test")
    return list(find_problems(machine, SETTINGS, follow))


def test_what_is_listed_may_be_named() -> None:
    found = problems(
        firmware="/usr/share/OVMF/OVMF.fd",
        kernel="/srv/boot/a/linux",
        initrd="/srv/boot/a/initrd",
        qemu="/usr/bin/qemu-system-x86_64",
        disks=[
            {
                "path": "/srv/disks/web/top.qcow2",
                "format": "qcow2",
                "backing": [{"path": "/srv/disks/base.raw"}],
            },
            {"path": "/srv/disks/inside"},
        ],
        nics=[{"bridge": "br0"}, {"tap": "tap7"}],
    )
    assert found == []


def test_a_machine_that_names_nothing_is_fine() -> None:
    assert problems(memory_mib=64) == []


def test_every_problem_is_named_at_once() -> None:
    found = problems(
        firmware="/etc/passwd",
        kernel="/srv/disks/x",
        initrd="/srv/boot/../disks/x",
        qemu="/tmp/qemu",
        disks=[
            {
                "path": "/srv/disks/top.qcow2",
                "format": "qcow2",
                "backing": [{"path": "/etc/shadow"}],
            },
            {"path": "/srv/disks/link"},
            {"path": "/srv/disks/missing"},
            {"path": "/srv/disks"},
            {"path": "/srv/disks-of-others/x"},
        ],
        nics=[{"bridge": "br1"}, {"tap": "tap8"}],
    )
    assert [problem.split(":")[0] for problem in found] == [
        *("firmware", "kernel", "initrd", "disks[0].backing[0].path"),
        *("disks[1].path", "disks[2].path", "disks[3].path", "disks[4].path"),
        *("qemu", "nics[0].bridge", "nics[1].tap"),
    ]


def test_a_link_that_leads_out_of_the_folder_is_refused_with_where_it_leads() -> None:
    (problem,) = problems(disks=[{"path": "/srv/disks/link"}])
    assert "/etc/shadow" in problem


def test_a_volume_is_a_link_to_its_device() -> None:
    assert problems(disks=[{"path": "/dev/vg0/root"}]) == []


def test_a_kernel_is_read_from_no_device() -> None:
    (problem,) = problems(kernel="/srv/boot/vmlinuz")
    assert "/dev/dm-3" in problem


def test_nothing_may_be_named_where_nothing_is_listed() -> None:
    machine = machine_from(
        {
            "name": "web",
            "firmware": "/f",
            "kernel": "/k",
            "qemu": "/usr/bin/qemu-system-x86_64",
            "disks": [{"path": "/d"}],
            "nics": [{"bridge": "br0"}, {"tap": "t0"}],
        },
        source="the test",
    )
    assert len(list(find_problems(machine, RemoteSettings(), follow))) == 6


def test_no_user_of_the_node_is_made_an_instances_but_one_that_is_listed() -> None:
    """The packet rules of an instance under `user` cut that user off, such as a database's."""
    machine = machine_from({"name": "web"}, source="the test")
    settings = RemoteSettings(security_domains=("guests",))

    require_allowed(machine, settings)
    require_allowed(machine, settings, security_domain="guests")
    with pytest.raises(RemoteOrderRefused, match=r"postgres is not in remote\.security_domains"):
        require_allowed(machine, settings, security_domain="postgres")


def test_nobody_learns_which_files_the_node_has() -> None:
    """What lies outside the folders is refused unseen: both answers are the same."""

    def never(path: Path) -> Place:
        pytest.fail(f"{path} was looked at")

    machine = machine_from({"name": "web", "firmware": "/etc/shadow"}, source="the test")
    (problem,) = find_problems(machine, SETTINGS, never)
    assert problem == "firmware: /etc/shadow lies in none of remote.firmware_folders"

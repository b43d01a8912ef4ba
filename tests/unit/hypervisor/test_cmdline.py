"""A machine's argument list, held against golden files and against what no value may do to it.

KVMSEC_UPDATE_GOLDEN=1 writes the golden files anew; look at what changed in them before they are
committed. One argument or option with its value stands on each line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cmdline import Grants, ImageGrant, NicGrant, build
from hypervisor.errors import ForbiddenArguments, SpecError, Unsupported
from hypervisor.features import DEVICES, Features
from hypervisor.machine import Backing, Disk, Machine, Nic

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("KVMSEC_UPDATE_GOLDEN") == "1"

QEMU_7_2 = Features(
    version=(7, 2, 22),
    package="Debian 1:7.2+dfsg-7+deb12u18",
    machines=("microvm", "pc", "pc-i440fx-7.2", "pc-q35-7.2", "q35"),
    devices=DEVICES,
    accelerators=("kvm", "tcg"),
    cpus=("Skylake-Client", "Skylake-Server", "host", "max"),
    sandbox=True,
)
MACHINES = {
    "tiny": Machine(
        name="tiny",
        memory_mib=1,
        firmware=Path("/secret/place/tiny.rom"),
        disks=(Disk(Path("/secret/place/tiny.img"), device="ide"),),
    ),
    "server": Machine(
        name="web1.example",
        memory_mib=4096,
        vcpus=4,
        machine="q35",
        cpu="host",
        disks=(
            Disk(
                Path("/secret/place/web1.qcow2"),
                format="qcow2",
                backing=(
                    Backing(Path("/secret/place/middle.qcow2"), "qcow2"),
                    Backing(Path("/secret/place/base.raw")),
                ),
                serial="system-1",
            ),
            Disk(Path("/dev/secret/data"), cache="none", aio="native", detect_zeroes="unmap"),
            Disk(Path("/secret/place/tools.iso"), device="cdrom"),
        ),
        nics=(
            Nic(bridge="br0", vhost=True),
            Nic(tap="secret-tap", model="e1000", mac="52:54:00:00:00:01"),
        ),
    ),
    "kernel": Machine(
        name="direct",
        machine="microvm",
        kernel=Path("/secret/place/vmlinuz"),
        initrd=Path("/secret/place/initrd"),
        append='console=ttyS0 root=/dev/vda,x=1 "a b"',
        disks=(Disk(Path("/secret/place/root.raw"), readonly=True),),
        nics=(Nic(bridge="br0"),),
        serial=False,
    ),
    "huge": Machine(name="huge", memory_mib=4096, hugepages="1G"),
    "scsi": Machine(
        name="scsi",
        machine="pc-i440fx-7.2",
        disks=(
            Disk(Path("/secret/place/a"), device="scsi", cache="writethrough"),
            Disk(Path("/secret/place/b"), device="scsi", cache="unsafe", readonly=True),
            *(Disk(Path(f"/secret/place/ide{n}"), device="ide") for n in range(3)),
        ),
    ),
}


def grants_for(machine: Machine, *, block_devices: bool = True) -> Grants:
    """Descriptor numbers as a launcher would deal them out."""
    numbers = iter(range(10, 1000))
    jail = {
        name: PurePosixPath(f"/boot/{name}")
        for name in ("firmware", "kernel", "initrd")
        if getattr(machine, name) is not None
    }
    return Grants(
        qmp=3,
        serial=4 if machine.serial else None,
        serial_log=PurePosixPath("/output/serial") if machine.serial else None,
        disks=tuple(
            tuple(
                ImageGrant(next(numbers), block_devices and str(path).startswith("/dev/"))
                for path in (disk.path, *(image.path for image in disk.backing))
            )
            for disk in machine.disks
        ),
        nics=tuple(
            NicGrant(next(numbers), next(numbers) if nic.vhost else None) for nic in machine.nics
        ),
        **jail,
    )


def argv_of(
    machine: Machine,
    features: Features = QEMU_7_2,
    accelerator: Literal["kvm", "tcg"] = "kvm",
    extra: tuple[str, ...] = (),
) -> tuple[str, ...]:
    return build(machine, features, grants_for(machine), accelerator=accelerator, extra=extra)


def lines_of(argv: tuple[str, ...]) -> Iterator[str]:
    rest = list(argv)
    while rest:
        line = rest.pop(0)
        if rest and not rest[0].startswith("-"):
            line += f" {rest.pop(0)}"
        yield line


@pytest.mark.parametrize("machine", MACHINES)
def test_the_argument_list_is_the_golden_one(machine: str) -> None:
    text = "\n".join(lines_of(argv_of(MACHINES[machine]))) + "\n"
    golden = GOLDEN / f"{machine}.txt"
    if UPDATE:
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("machine", MACHINES)
def test_no_host_path_is_in_the_list(machine: str) -> None:
    assert "secret" not in " ".join(argv_of(MACHINES[machine]))


@pytest.mark.parametrize("machine", MACHINES)
def test_a_guest_can_not_run_before_it_was_looked_at(machine: str) -> None:
    argv = argv_of(MACHINES[machine])
    assert "-S" in argv
    assert "-no-reboot" not in argv
    sandbox = argv[argv.index("-sandbox") + 1]
    assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_every_image_spells_out_its_access_and_what_is_below() -> None:
    argv = argv_of(MACHINES["server"])
    nodes = [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]
    by_name = {node["node-name"]: node for node in nodes}
    assert all(node["auto-read-only"] is False for node in nodes)
    assert by_name["image0-0"]["backing"] == "image0-1"
    assert by_name["image0-1"]["backing"] == "image0-2"
    assert "backing" not in by_name["image0-2"]  # raw has none
    assert [by_name[f"image0-{n}"]["read-only"] for n in range(3)] == [False, True, True]
    assert [node["node-name"] for node in nodes].index("image0-2") < [
        node["node-name"] for node in nodes
    ].index("image0-0")


def test_a_qcow2_image_without_backing_files_says_so() -> None:
    machine = Machine(name="a", disks=(Disk(Path("/a"), format="qcow2"),))
    argv = argv_of(machine)
    image = json.loads([argv[i + 1] for i, word in enumerate(argv) if word == "-blockdev"][-1])
    assert image["backing"] is None


def test_an_unknown_cpu_model_is_refused_with_those_that_sound_alike() -> None:
    machine = Machine(name="a", cpu="Skylake-Sever")
    with pytest.raises(Unsupported, match="has no CPU model Skylake-Sever") as caught:
        argv_of(machine)
    assert "it has Skylake-Server" in (caught.value.hint or "")
    with pytest.raises(Unsupported) as caught:
        argv_of(evolve(machine, cpu="z80"))
    assert "it has host, max" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("features", "machine", "words"),
    [
        (evolve(QEMU_7_2, sandbox=False), MACHINES["tiny"], "seccomp"),
        (evolve(QEMU_7_2, accelerators=("tcg",)), MACHINES["tiny"], "without kvm"),
        (evolve(QEMU_7_2, machines=("q35",)), MACHINES["tiny"], "machine type pc"),
        (evolve(QEMU_7_2, devices=()), MACHINES["scsi"], "no device ide-hd"),
    ],
)
def test_what_this_qemu_lacks_is_said(features: Features, machine: Machine, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        argv_of(machine, features)


def test_the_hosts_cpu_is_refused_when_auto_came_to_tcg() -> None:
    machine = Machine(name="a", cpu="host", accelerator="auto")
    assert argv_of(machine)
    with pytest.raises(Unsupported, match="host"):
        argv_of(machine, accelerator="tcg")


@pytest.mark.parametrize(
    "broken",
    [
        {"disks": ()},
        {"nics": (NicGrant(5),)},
        {"firmware": None},
        {"kernel": PurePosixPath("/boot/kernel")},
        {"serial": None},
    ],
)
def test_grants_that_do_not_fit_the_machine_are_refused(broken: dict[str, Any]) -> None:
    grants = evolve(grants_for(MACHINES["tiny"]), **broken)
    with pytest.raises(ValueError, match="needs"):
        build(MACHINES["tiny"], QEMU_7_2, grants, accelerator="kvm")


def test_extra_arguments_come_last_and_only_from_the_list_of_allowed_ones() -> None:
    argv = argv_of(MACHINES["tiny"], extra=("--boot", "menu=on"))
    assert argv[-2:] == ("-boot", "menu=on")
    with pytest.raises(ForbiddenArguments):
        argv_of(MACHINES["tiny"], extra=("-monitor", "stdio"))


# What follows gives a machine every text that its rules let through and many that they don't, and
# reads the list back as QEMU does: the options and their keys must be those of the plain machine.

HOSTILE = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "a,readonly=on",
            "a,,b",
            "-monitor",
            "x\n-daemonize",
            '"},{"driver":"null-co',
            "a\0b",
            "json:{}",
            "fd=9",
            "[",
        ]
    ),
)


def shape(argv: tuple[str, ...]) -> list[object]:
    """The options of a list, and the keys of each composite value, without the values."""
    shapes: list[object] = []
    rest = iter(argv)
    for word in rest:
        if word in ("-nodefaults", "-no-user-config", "-S"):
            shapes.append(word)
            continue
        value = next(rest)
        if word in ("-append", "-bios", "-kernel", "-initrd"):
            shapes.append(word)
        elif value.startswith("{"):
            shapes.append((word, keys_of(json.loads(value))))
        else:
            parts = value.replace(",,", "").split(",")
            shapes.append((word, [part.partition("=")[0] for part in parts if "=" in part]))
    return shapes


def keys_of(value: object) -> object:
    return {key: keys_of(inner) for key, inner in value.items()} if isinstance(value, dict) else ""


@st.composite
def hostile_machines(draw: st.DrawFn) -> tuple[Machine, Machine]:
    """A machine with hostile values (as far as it can be made), and one of the same shape."""
    plain: dict[str, Any] = {"name": "a", "machine": "pc", "cpu": "max", "append": "x"}
    plain |= {"kernel": Path("/k"), "firmware": Path("/f")}
    disk: dict[str, Any] = {"path": Path("/p"), "serial": "s", "format": "qcow2"}
    nic: dict[str, Any] = {"tap": "t0", "mac": "52:54:00:00:00:01"}
    values = dict(plain), dict(disk), dict(nic)
    for mapping in values:
        for key in mapping:
            if draw(st.booleans()):
                text = draw(HOSTILE)
                mapping[key] = Path("/" + text) if isinstance(mapping[key], Path) else text

    def made(fields: dict[str, Any], disk: dict[str, Any], nic: dict[str, Any]) -> Machine:
        return Machine(**fields, disks=(Disk(**disk),), nics=(Nic(**nic),))

    try:
        return made(*values), made(plain, disk, nic)
    except SpecError:
        for mapping, safe in zip(values, (plain, disk, nic), strict=True):
            for key in mapping:
                if key not in ("append", "path", "kernel", "firmware"):
                    mapping[key] = safe[key]
        try:
            return made(*values), made(plain, disk, nic)
        except SpecError:
            return made(plain, disk, nic), made(plain, disk, nic)


@given(hostile_machines())
def test_no_value_adds_an_option_or_a_key(machines: tuple[Machine, Machine]) -> None:
    hostile, plain = machines
    features = evolve(QEMU_7_2, machines=(hostile.machine, plain.machine))
    argv = argv_of(hostile, features)
    assert shape(argv) == shape(argv_of(plain, features))
    if hostile.append is not None:
        assert argv[argv.index("-append") + 1] == hostile.append


@given(log=HOSTILE)
def test_a_path_in_the_jail_adds_no_key_either(log: str) -> None:
    machine = MACHINES["tiny"]
    grants = evolve(grants_for(machine), serial_log=PurePosixPath("/" + log))
    plain = evolve(grants, serial_log=PurePosixPath("/log"))
    assert shape(build(machine, QEMU_7_2, grants, accelerator="kvm")) == shape(
        build(machine, QEMU_7_2, plain, accelerator="kvm")
    )

"""What people write becomes a machine, or an error that names every fault and its place."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.errors import SpecError
from hypervisor.spec import (
    Backing,
    Disk,
    Limits,
    Machine,
    Nic,
    disk_from_option,
    machine_from,
    merge,
    nic_from_option,
)

DEFINITION = """
name = "web1"
memory_mib = 512
vcpus = 2
machine = "q35"
accelerator = "auto"
kernel = "/boot/vmlinuz"
append = "console=ttyS0"

[[disks]]
path = "/srv/web1.qcow2"
format = "qcow2"
backing = [{path = "/srv/middle.qcow2", format = "qcow2"}, "/srv/base.raw"]

[[disks]]
path = "/dev/vg/data"
device = "scsi"
cache = "none"

[[nics]]
bridge = "br0"
vhost = true
"""


def faults(mapping: dict[str, object]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        machine_from(mapping, source="web1.toml")
    return [str(problem) for problem in caught.value.problems]


def test_a_definition_becomes_a_machine() -> None:
    assert machine_from(tomllib.loads(DEFINITION), source="web1.toml") == Machine(
        name="web1",
        memory_mib=512,
        vcpus=2,
        machine="q35",
        accelerator="auto",
        kernel=Path("/boot/vmlinuz"),
        append="console=ttyS0",
        disks=(
            Disk(
                Path("/srv/web1.qcow2"),
                format="qcow2",
                backing=(
                    Backing(Path("/srv/middle.qcow2"), "qcow2"),
                    Backing(Path("/srv/base.raw")),
                ),
            ),
            Disk(Path("/dev/vg/data"), device="scsi", cache="none"),
        ),
        nics=(Nic(bridge="br0", vhost=True),),
    )


def test_every_fault_is_reported_with_its_place() -> None:
    found = faults(
        {
            "name": "../x",
            "memory_mib": 0,
            "disks": [
                {"path": "relative"},
                {"path": "/b", "format": "vmdk", "readonly": "yes"},
                {"path": "/c", "format": "qcow2", "backing": ["/d", {"path": "/e", "colour": 1}]},
            ],
            "nics": [{"tap": "t0"}, {}],
            "colour": "red",
        }
    )
    assert [fault.partition(": ")[0] for fault in found[:-1]] == [
        "name",
        "memory_mib",
        "disks[0].path",
        "disks[1].format",
        "disks[1].readonly",
        "disks[2].backing[1]",
        "nics[1]",
    ]
    assert found[-1].startswith("unknown key 'colour'")


def test_a_list_that_is_far_too_long_is_not_even_looked_into() -> None:
    """Another node may send one; a fault of each element would cost seconds and a gigabyte."""
    listed = faults({"name": "web", "disks": [1] * 400_000, "nics": [{"bridge": "br0"}] * 33})
    assert sorted(listed) == [
        "disks: 400000 elements, at most 32 are taken by any list",
        "nics: 33 elements, at most 32 are taken by any list",
    ]


def test_the_first_faults_of_many_are_told_and_that_there_are_more() -> None:
    listed = faults({"name": "web", **{f"key{number}": 1 for number in range(50_000)}})
    assert len(listed) == 101
    assert listed[0].startswith("unknown key 'key0'")
    assert "and more" in listed[-1]


def test_a_fault_names_the_file() -> None:
    with pytest.raises(SpecError, match=r"^web1.toml: name: is missing$"):
        machine_from({}, source="web1.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_mib", "512"),
        ("memory_mib", 512.0),
        ("memory_mib", True),
        ("vcpus", None),
        ("name", 5),
        ("serial", "no"),
        ("serial", 0),
        ("firmware", 5),
        ("disks", "/srv/a"),
        ("disks", {"path": "/srv/a"}),
        ("disks", ["/srv/a"]),
        ("nics", 5),
        ("machine", ["pc"]),
    ],
)
def test_a_value_of_another_type_is_not_turned_into_one(key: str, value: object) -> None:
    (fault,) = faults({"name": "a", key: value})
    assert fault.startswith(key)


def test_a_document_that_is_no_table_is_refused() -> None:
    with pytest.raises(SpecError, match="not a table"):
        machine_from(["name"], source="web1.json")  # type: ignore[arg-type]


def test_rules_over_several_fields_are_reported_with_their_place_too() -> None:
    (fault,) = faults({"name": "a", "disks": [{"path": "/a", "device": "ide", "readonly": True}]})
    assert fault.startswith("disks[0].readonly: ")


def test_an_error_holds_no_raw_control_character_of_a_value() -> None:
    found = faults({"name": "\x1b[31m\n", "\x1b]0;x": 1, "disks": [{"path": "\x1b"}]})
    assert len(found) == 3
    assert not any(character < " " for fault in found for character in fault)


def test_options_win_over_a_definition() -> None:
    base = tomllib.loads(DEFINITION)
    machine = machine_from(
        merge(base, {"memory_mib": 64, "vcpus": None, "disks": [disk_from_option("/other")]}),
        source="options",
    )
    assert (machine.memory_mib, machine.vcpus) == (64, 2)
    assert machine.disks == (Disk(Path("/other")),)
    assert machine.nics == (Nic(bridge="br0", vhost=True),)
    assert base["memory_mib"] == 512


def test_a_disk_option_is_read() -> None:
    assert disk_from_option("/a,,b,format=qcow2,readonly=on,detect-zeroes=on") == {
        "path": "/a,b",
        "format": "qcow2",
        "readonly": True,
        "detect_zeroes": "on",
    }


def test_a_chain_is_read_from_a_disk_option() -> None:
    option = "/a,format=qcow2,backing=/b,backing-format=qcow2,backing=/c"
    assert disk_from_option(option)["backing"] == [
        {"path": "/b", "format": "qcow2"},
        {"path": "/c"},
    ]


def test_relative_paths_are_taken_from_the_given_folder() -> None:
    disk = disk_from_option("a.img,format=qcow2,backing=../b.img", folder=Path("/srv/images"))
    assert disk["path"] == "/srv/images/a.img"
    assert disk["backing"] == [{"path": "/srv/images/../b.img"}]
    assert disk_from_option("/abs", folder=Path("/srv")) == {"path": "/abs"}


def test_a_nic_option_is_read() -> None:
    assert nic_from_option("bridge=br0,mac=52:54:00:00:00:01,vhost=off") == {
        "bridge": "br0",
        "mac": "52:54:00:00:00:01",
        "vhost": False,
    }


@pytest.mark.parametrize(
    ("option", "complaints"),
    [
        ("", ["path: is missing"]),
        ("format=raw", ["path: is missing"]),
        ("/a,format", ["'format' is not KEY=VALUE"]),
        ("/a,readonly=maybe", ["readonly: 'maybe' is not on or off"]),
        ("/a,format=raw,format=qcow2", ["format: is given twice"]),
        ("/a,backing-format=raw", ["backing_format: follows no backing file of its own"]),
    ],
)
def test_a_disk_option_that_can_not_be_read_is_refused(option: str, complaints: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        disk_from_option(option)
    assert [str(problem) for problem in caught.value.problems] == complaints


def test_all_complaints_about_an_option_come_together() -> None:
    with pytest.raises(SpecError) as caught:
        nic_from_option("tap=t0,colour=red,vhost=5,x")
    assert len(caught.value.problems) == 3


@given(st.text(min_size=1).filter(lambda text: "=" not in text))
def test_any_path_with_doubled_commas_comes_back_as_it_was(path: str) -> None:
    assert disk_from_option(path.replace(",", ",,") + ",format=raw") == {
        "path": str(Path(path)),
        "format": "raw",
    }


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(["name", "memory_mib", "disks", "nics", "firmware", "append", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ),
    )
)
def test_any_document_gives_a_machine_or_a_spec_error(mapping: dict[str, object]) -> None:
    try:
        machine = machine_from(mapping, source="fuzz")
    except SpecError as error:
        assert error.problems
    else:
        assert machine.name == mapping["name"]


def test_every_fault_of_the_limits_comes_with_the_others_and_its_place() -> None:
    limits = {"cpu_weight": 0, "cpu_quota_percent": "50%", "io_wait": 1, "oom_score_adjust": True}
    found = faults({"name": "web1", "vcpus": 0, "limits": limits})
    assert len(found) == 5
    for place in ("vcpus: 0", "limits.cpu_weight: 0", "limits.cpu_quota_percent: '50%'"):
        assert any(fault.startswith(place) for fault in found), place
    assert any("io_wait" in fault for fault in found)


def test_an_option_of_a_table_leaves_the_rest_of_the_table_alone() -> None:
    base = {"name": "web1", "limits": {"cpu_weight": 50, "io_weight": 20}}
    merged = merge(base, {"limits": {"cpu_weight": 80, "cpu_quota_percent": None}})
    machine = machine_from(merged, source="web1.toml")
    assert machine.limits == Limits(cpu_weight=80, io_weight=20)
    assert base["limits"] == {"cpu_weight": 50, "io_weight": 20}
    assert merge({"limits": {"cpu_weight": 1}}, {"limits": None}) == {"limits": {"cpu_weight": 1}}
    assert merge({"limits": 5}, {"limits": {"io_weight": 1}}) == {"limits": {"io_weight": 1}}

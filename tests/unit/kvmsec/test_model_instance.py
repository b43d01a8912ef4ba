"""An instance's definition, from what a file or options hold to every fault in it."""

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hypervisor.errors import SpecError
from hypervisor.machine import Backing, Disk, Limits, Machine, Nic
from kvmsec.errors import BadDefinition, BadName
from kvmsec.model.instance import (
    InstanceDefinition,
    definition_from,
    document_of,
    read_definition,
    read_kept_definition,
)
from kvmsec.model.names import require_name
from kvmsec.model.security import SecurityModel

WHOLE = """
security_model = "user"
security_domain = "web"
autostart = true
memory_mib = 64
firmware = "/srv/tiny.rom"
[[disks]]
path = "/srv/disk.img"
"""


def faults(document: dict[str, object], name: str = "web1") -> tuple[str, ...]:
    with pytest.raises(BadDefinition) as caught:
        definition_from(document, name, source="web1.toml")
    assert caught.value.message.startswith("web1.toml:")
    return caught.value.problems


def test_a_definition_is_one_flat_table(tmp_path: Path) -> None:
    file = tmp_path / "web1.toml"
    file.write_text(WHOLE)
    definition = definition_from(read_definition(file), "web1", source=str(file))

    assert definition.name == definition.machine.name == "web1"
    assert definition.security_model is SecurityModel.USER
    assert definition.security_domain == "web"
    assert definition.autostart
    assert definition.machine.memory_mib == 64
    assert definition.machine.disks[0].path == Path("/srv/disk.img")


def test_json_holds_the_same(tmp_path: Path) -> None:
    file = tmp_path / "web1.json"
    file.write_text(json.dumps({"memory_mib": 64, "name": "web1"}))

    assert definition_from(read_definition(file), "web1", source="-").machine.memory_mib == 64


def test_nothing_said_leaves_security_to_the_cluster() -> None:
    definition = definition_from({}, "web1", source="options")

    assert definition == InstanceDefinition(machine=Machine(name="web1"))
    assert definition.security_model is None
    assert not definition.autostart


@pytest.mark.parametrize(
    ("written", "meant"),
    [("memory", "memory_mib"), ("secruity_model", "security_model"), ("auto_start", "autostart")],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(written: str, meant: str) -> None:
    assert faults({written: 1}) == (f"{written}: unknown key; did you mean {meant}?",)


def test_an_unknown_key_like_no_other_is_told_with_all_that_are() -> None:
    (problem,) = faults({"colour": "red"})

    assert problem.startswith("colour: unknown key; there are name, memory_mib, ")
    assert problem.endswith(", security_model, security_domain, autostart")


def test_all_faults_are_named_together_ours_and_the_machines() -> None:
    problems = faults(
        {
            "name": "web2",
            "security_model": "root",
            "autostart": "yes",
            "memory_mib": 0,
            "colour": "red",
        }
    )
    text = "\n".join(problems)

    for part in ("name: ", "security_model: ", "autostart: ", "memory_mib: ", "colour"):
        assert part in text


@pytest.mark.parametrize(
    "document",
    [
        {"security_model": "user"},
        {"security_model": "pool", "security_domain": "web"},
        {"security_model": "none", "security_domain": "web"},
        {"security_domain": ""},
        {"security_domain": "a\nb"},
        {"security_domain": 5},
    ],
)
def test_a_domain_that_does_not_fit_is_a_fault_of_the_definition(
    document: dict[str, object],
) -> None:
    (problem,) = faults(document)
    assert problem.startswith("security_domain: ")


def made(build: object, **parts: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Values of a class whose rules hold; each part is given or left to its default."""

    @st.composite
    def one(draw: st.DrawFn) -> object:
        given_parts = {name: draw(part) for name, part in parts.items() if draw(st.booleans())}
        try:
            return build(**given_parts)  # type: ignore[operator]
        except (SpecError, TypeError):
            assume(False)

    return one()


PATHS = st.sampled_from([Path("/a"), Path("/srv/b c"), Path("/é/=,"), Path("/dev/vg/x")])
FORMATS = st.sampled_from(["raw", "qcow2"])
DISKS = made(
    Disk,
    path=PATHS,
    format=FORMATS,
    readonly=st.booleans(),
    device=st.sampled_from(["virtio", "scsi", "ide", "cdrom"]),
    backing=st.lists(made(Backing, path=PATHS, format=FORMATS), max_size=2).map(tuple),
    cache=st.sampled_from(["writeback", "none", "directsync"]),
    aio=st.sampled_from(["threads", "native"]),
    discard=st.sampled_from(["unmap", "ignore"]),
    serial=st.sampled_from([None, "A-1"]),
)
NICS = made(
    Nic,
    tap=st.sampled_from(["tap0", "tap1"]),
    bridge=st.just("br0"),
    mac=st.just("52:54:00:00:00:01"),
    vhost=st.booleans(),
)
MACHINES = made(
    lambda **parts: Machine(name="web1", **parts),
    memory_mib=st.integers(1, 4096),
    hugepages=st.sampled_from([None, "2M"]),
    vcpus=st.integers(1, 255),
    machine=st.sampled_from(["pc", "q35", "microvm"]),
    cpu=st.sampled_from([None, "max"]),
    accelerator=st.sampled_from(["kvm", "tcg", "auto"]),
    firmware=PATHS,
    kernel=PATHS,
    append=st.text(),
    disks=st.lists(DISKS, max_size=3).map(tuple),
    nics=st.lists(NICS, max_size=2).map(tuple),
    serial=st.booleans(),
    limits=made(Limits, cpu_weight=st.integers(1, 10_000), oom_score_adjust=st.integers(-9, 9)),
    qemu=PATHS,
)
SECURITIES = st.sampled_from(
    [(None, None), (SecurityModel.NONE, None), (SecurityModel.USER, "web")]
)


@given(MACHINES, SECURITIES, st.booleans())
def test_a_definition_travels_as_the_table_that_a_file_would_hold(
    machine: Machine, security: tuple[SecurityModel | None, str | None], autostart: bool
) -> None:
    model, domain = security
    definition = InstanceDefinition(
        machine=machine, security_model=model, security_domain=domain, autostart=autostart
    )
    sent = msgspec.json.encode(document_of(definition))

    assert definition_from(msgspec.json.decode(sent), "web1", source="a call") == definition


def test_what_was_not_chosen_is_not_in_the_table() -> None:
    assert document_of(InstanceDefinition(machine=Machine(name="web1"))) == {"name": "web1"}


NAMES = ["", "../x", "-x", "x\n", "A", "a_b", "é", "a" * 64, "a" * 4096, "a", "a.b-c", "a" * 63]


@pytest.mark.parametrize("name", NAMES)
def test_the_application_and_the_hypervisor_take_the_same_names(name: str) -> None:
    def takes(make: object) -> bool:
        try:
            require_name("an instance", name) if make is require_name else Machine(name=name)
        except (BadName, SpecError):
            return False
        return True

    assert takes(require_name) == takes(Machine)


def test_a_bad_name_is_refused_before_anything_else() -> None:
    with pytest.raises(BadName):
        definition_from({"colour": "red"}, "../x", source="options")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("web1.toml", b"memory_mib = "),
        ("web1.toml", b"\xff"),
        ("web1.toml", b"a = " + b"[" * 20000),
        ("web1.json", b"[1, 2]"),
        ("web1.json", b'{"a": '),
        ("web1.json", b"[" * 200_000),
        ("web1.toml", b"#" * ((1 << 20) + 1)),
    ],
)
def test_a_garbled_file_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BadDefinition) as caught:
        read_definition(file)
    assert caught.value.source == str(file)
    assert len(caught.value.message) < 500


def test_a_fifo_or_a_directory_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", tmp_path):
        with pytest.raises(BadDefinition, match="not a regular file"):
            read_definition(place)


def test_a_missing_file_is_the_callers_to_judge(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_definition(tmp_path / "web1.toml")


@pytest.mark.root
def test_a_kept_definition_that_others_can_change_is_refused() -> None:
    place = Path("/run/kvmsec-test-definition.toml")
    place.write_text("memory_mib = 64")
    try:
        assert read_kept_definition(place) == {"memory_mib": 64}
        place.chmod(0o666)
        with pytest.raises(BadDefinition) as refused:
            read_kept_definition(place)
        assert refused.value.message == f"{place}: can be written by others (mode 0666)"
    finally:
        place.unlink()

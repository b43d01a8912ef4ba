"""What QEMU's arguments say, and that no secret of theirs is told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.audit.arguments import parse_cmdline, read_arguments
from kvmsec.audit.facts import Arguments

SECRET = "hunter2"


def read(*arguments: str) -> Arguments:
    return read_arguments(["qemu-system-x86_64", *arguments])


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["-object", f"secret,id=s,data={SECRET}"], "-object"),
        (["--object", f"secret,id=s,format=raw,data={SECRET}"], "-object"),
        (["-object", json.dumps({"qom-type": "secret", "id": "s", "data": SECRET})], "-object"),
        (["-spice", f"port=5900,password={SECRET}"], "-spice"),
        (["-drive", f"file=iscsi://user%{SECRET}@host/iqn/1,if=virtio"], "-drive"),
        (["-drive", f"file=http://user:{SECRET}@host/disk.img"], "-drive"),
        (["-drive", f"file=rbd:pool/disk:id=admin:key={SECRET},format=raw"], "-drive"),
        (["-cdrom", f"https://u:{SECRET}@host/x.iso"], "-cdrom"),
        (["-iscsi", f"user=me,password={SECRET}"], "-iscsi"),
        (
            ["-blockdev", json.dumps({"driver": "http", "url": "http://h/x", "cookie": SECRET})],
            "-blockdev",
        ),
        (["-blockdev", f"driver=iscsi,user=me,password={SECRET},transport=tcp"], "-blockdev"),
        (["-drive", f'file=json:{{"driver":"https",,"cookie":"{SECRET}"}},if=virtio'], "-drive"),
        (["-hda", f'json:{{"driver":"https","file":{{"cookie":"{SECRET}"}}}}'], "-hda"),
        ([f"https://u:{SECRET}@host/disk.img"], "a"),  # disk image
        (["-append", f"root=/dev/vda password={SECRET}"], "-append"),
        (["-smbios", f"type=11,value=io.systemd.credential:root.pw={SECRET}"], "-smbios"),
        (["-fw_cfg", f"name=opt/io.systemd.credentials/x,string={SECRET}"], "-fw_cfg"),
    ],
)
def test_a_secret_is_found_and_not_repeated(arguments: list[str], option: str) -> None:
    found = read("-m", "64", *arguments)

    assert [one.split()[0] for one in found.secrets] == [option]
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-vnc", ":1,password=on"],
        ["-vnc", ":1,password"],
        ["-vnc", ":1,password-secret=s"],
        ["-spice", "port=5900,password-secret=s"],
        ["-object", "secret,id=s,file=/run/key"],
        ["-object", "secret,id=s,keyid=master,iv=AAAA,data=ENCRYPTED"],
        ["-drive", "file=/srv/a.qcow2,encrypt.key-secret=s"],
        ["-blockdev", "driver=http,url=http://host/x,password-secret=s,cookie-secret=c"],
        ["-append", "console=ttyS0 root=/dev/vda"],
        ["-smbios", "type=1,serial=ds=nocloud"],
        ["-object", "rng-random,id=r,filename=/dev/urandom"],
    ],
)
def test_what_is_no_secret_is_left_alone(arguments: list[str]) -> None:
    assert read(*arguments).secrets == ()


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("on", set()),
        ("on,spawn=deny", {"spawn"}),
        ("enable=on,spawn=deny,elevateprivileges=children", {"spawn"}),
        (
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            {"obsolete", "elevateprivileges", "spawn", "resourcecontrol"},
        ),
    ],
)
def test_the_sandbox_s_settings_are_told(text: str, denied: set[str]) -> None:
    found = read("-sandbox", text).sandbox

    assert found is not None
    assert {name for name, value in found.items() if value == "deny"} == denied


@pytest.mark.parametrize("arguments", [[], ["-sandbox", "off"], ["-sandbox"]])
def test_no_sandbox_is_none(arguments: list[str]) -> None:
    assert read(*arguments).sandbox is None


def test_the_last_sandbox_counts() -> None:
    assert read("-sandbox", "on", "-sandbox", "off").sandbox is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-name", "shop"], "shop"),
        (["-name", "guest=shop,debug-threads=on"], "shop"),
        (["-name", "a,,b,process=x"], "a,b"),
        (["-name", "\x1b[2Jx"], "\\x1b[2Jx"),
        ([], None),
    ],
)
def test_the_name_is_the_guest_s_escaped(arguments: list[str], name: str | None) -> None:
    assert read(*arguments).name == name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-qmp", "tcp:0.0.0.0:4444,server"], "-qmp"),
        (["-monitor", "telnet:127.0.0.1:5,server"], "-monitor"),
        (["-s"], "-s"),
        (["-gdb", "tcp::1234"], "-gdb"),
        (["-vnc", ":0"], "-vnc (without a password)"),
        (["-vnc", "0.0.0.0:0,password=on"], "-vnc (with a password)"),
        (["-spice", "port=5900,disable-ticketing=on"], "-spice (without a password)"),
        (["-chardev", "socket,id=m,host=0.0.0.0,port=1,server=on"], "-chardev socket"),
        (["-incoming", "tcp:0:4444"], "-incoming"),
    ],
)
def test_what_asks_for_tcp_is_told(arguments: list[str], expected: str) -> None:
    assert read(*arguments).exposed == (expected,)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-vnc", "none"],
        ["-vnc", "unix:/run/vnc"],
        ["-qmp", "unix:/run/qmp,server"],
        ["-chardev", "socket,id=m,path=/run/m,server=on"],
        ["-chardev", "socket,id=m,fd=3,server=on"],
        ["-serial", "stdio"],
    ],
)
def test_what_stays_on_unix_sockets_is_not(arguments: list[str]) -> None:
    assert read(*arguments).exposed == ()


@given(st.binary(max_size=4096))
def test_any_bytes_are_read_bounded_and_printable(raw: bytes) -> None:
    found = read_arguments(parse_cmdline(raw))

    shown = [found.name or "", *found.secrets, *found.exposed, *(found.sandbox or {}).values()]
    assert all(text.isprintable() and len(text) < 200 for text in shown)
    assert len(found.secrets) <= 16 and len(found.exposed) <= 16
    json.dumps(shown)


OPTIONS = ("-name", "-object", "-sandbox", "-vnc", "-drive", "-append", "-chardev", "{", "-")


@given(st.lists(st.sampled_from(OPTIONS) | st.text(max_size=50), max_size=20))
def test_any_options_are_read(argv: list[str]) -> None:
    found = read_arguments(argv)

    assert found.name is None or found.name.isprintable()


def test_json_that_is_nested_without_end_is_no_error() -> None:
    assert read("-object", '{"a":' * 50_000).secrets == ()

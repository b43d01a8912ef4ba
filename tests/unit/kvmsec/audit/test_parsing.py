"""What the kernel's tables say of a process, whatever that has put into them."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.audit.control_groups import Membership, parse_memberships
from kvmsec.audit.facts import Limit
from kvmsec.audit.process_files import fields_of
from kvmsec.audit.reading import parse_limits, secret_variables
from kvmsec.audit.sockets import InetSocket, UnixSocket, parse_inet, parse_unix

TCP = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:170C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 513 1
   1: 0100007F:170C 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 514 1
"""
TCP6 = b"""\
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000001000000:0016 0000000000000000:0000 0A 0:0 0:0 0 0 0 7 1
"""
UNIX = b"""\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 20 /run/q
0000000000000000: 00000002 00000000 00010000 0001 01 21 @abstract
0000000000000000: 00000003 00000000 00000000 0001 03 22
0000000000000000: 00000002 00000000 00010000 0001 01 23 /tmp/a b
/x: y
"""


def test_ip_sockets_are_told_with_their_ends() -> None:
    assert parse_inet("tcp", TCP) == {
        513: InetSocket("tcp", "127.0.0.1:5900", True),
        514: InetSocket("tcp", "127.0.0.1:5900", False),
    }
    assert parse_inet("tcp6", TCP6) == {7: InetSocket("tcp6", "[::1]:22", True)}
    assert str(parse_inet("tcp6", TCP6)[7]) == "tcp [::1]:22"


def test_a_datagram_socket_listens_on_nothing() -> None:
    assert not any(one.listens for one in parse_inet("udp", TCP).values())


def test_unix_sockets_are_told_with_their_paths() -> None:
    assert parse_unix(UNIX) == {
        20: UnixSocket(b"/run/q", True),
        21: UnixSocket(b"@abstract", True),
        22: UnixSocket(b"", False),
        23: UnixSocket(b"/tmp/a b", True),
    }


def test_a_path_can_not_forge_the_row_of_another_socket() -> None:
    forged = UNIX + b"0000000000000000: 2 0 00000000 0001 01 20 /harmless\n"

    assert parse_unix(forged)[20] == UnixSocket(b"/run/q", True)


def test_limits_are_told_by_their_names() -> None:
    text = (
        b"Limit                     Soft Limit           Hard Limit           Units     \n"
        b"Max core file size        0                    unlimited            bytes     \n"
        b"Max open files            1024                 524288               files     \n"
        b"Max nice priority         0                    0                    \n"
    )
    assert dict(parse_limits(text)) == {
        "core file size": Limit(0, None),
        "open files": Limit(1024, 524288),
        "nice priority": Limit(0, 0),
    }


def test_control_groups_are_told_by_version() -> None:
    text = b"9:name=systemd:/\n4:cpu,cpuacct:/a:b\n0::/user.slice\n"

    assert parse_memberships(text) == [
        Membership(frozenset({"name=systemd"}), "/"),
        Membership(frozenset({"cpu", "cpuacct"}), "/a:b"),
        Membership(frozenset(), "/user.slice"),
    ]


def test_a_line_of_status_counts_once() -> None:
    """A later line of the same name can't take the place of the kernel's own."""
    fields = fields_of(b"Name:\tqemu\\nUid:\t5\nUid:\t0\t0\t0\t0\nUid:\t9\n")

    assert fields[b"Uid"] == b"0\t0\t0\t0"


def test_variables_are_told_without_their_values() -> None:
    environ = b"PATH=/bin\0API_TOKEN=hunter2\0db_password=x\0\x1b[SECRET=1\0API_TOKEN=again\0"

    assert secret_variables(environ) == ("API_TOKEN", "db_password", "\\x1b[SECRET")


def test_a_giant_environment_is_told_in_part() -> None:
    environ = b"\0".join(b"SECRET%d=x" % number for number in range(100_000))

    assert len(secret_variables(environ)) == 8


@given(st.binary(max_size=2000))
def test_any_table_is_read_or_refused_with_an_error_that_is_expected(raw: bytes) -> None:
    for parse in (parse_unix, parse_memberships, fields_of, secret_variables):
        with contextlib.suppress(ValueError):
            parse(raw)  # type: ignore[operator]
    for text in (raw, b"x\n" + raw):
        with contextlib.suppress(ValueError):
            parse_inet("tcp", text)
        with contextlib.suppress(ValueError):
            dict(parse_limits(text))


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_names_of_variables_are_printable_and_short(names: list[bytes]) -> None:
    environ = b"\0".join(name + b"SECRET=value" for name in names)

    told = secret_variables(environ)
    assert all(name.isprintable() and len(name) < 300 for name in told)
    json.dumps(told)


@pytest.mark.parametrize("address", ["", "zz:zz", "0100007F", "0100007F:ZZZZ", "\x1b:1"])
def test_an_address_that_is_none_is_shown_escaped(address: str) -> None:
    row = f"head\n0: {address or '-'} x 0A 0 0 0 0 0 5 1\n"

    assert all(one.local.isprintable() for one in parse_inet("tcp", row.encode()).values())

"""What is asked of taps and remembered of them, and what is read of an interface's IPv6."""

import asyncio
import subprocess
import sys

import msgspec
import pytest

from kvmsec.linux.processes import boot_id
from kvmsec.node import ipv6
from kvmsec.node.ipv6 import Ipv6
from kvmsec.node.tap_records import TapRecord, TapRequest, TapSettings
from kvmsec.node.taps import leaked_taps, remove_taps


def test_a_nic_has_either_a_tap_or_a_bridge() -> None:
    with pytest.raises(ValueError, match="either a tap or a bridge"):
        TapRequest()
    with pytest.raises(ValueError, match="either a tap or a bridge"):
        TapRequest(tap="tap0", bridge="br0")


def test_a_record_survives_being_written_and_read() -> None:
    settings = TapSettings(
        owner=None,
        group=27,
        features=0x5000,
        mac="02:00:00:00:00:01",
        mtu=1500,
        is_up=False,
        master=3,
        ipv6=Ipv6(False, 0),
    )
    for record in (
        TapRecord("kvms0123456789a", 7, made=True, bridge="br0"),
        TapRecord("tap0", 8, made=False, former=settings),
    ):
        assert msgspec.json.decode(msgspec.json.encode(record), type=TapRecord) == record
        assert record.boot == boot_id()


def test_nothing_that_is_gone_needs_the_slow_library() -> None:
    """`stop` and every command that acts come by here: an import of 150 ms would be felt."""
    code = (
        "import asyncio, sys\n"
        "from kvmsec.node.taps import TapRecord, leaked_taps, remove_taps\n"
        "asyncio.run(remove_taps([TapRecord('kvms0123456789a', 999999, made=True)]))\n"
        "assert asyncio.run(leaked_taps([], tag='kvmsec_of_nobody')) == []\n"
        "assert 'pyroute2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_records_of_another_boot_mean_nothing() -> None:
    """`lo` would be found by name and index: it is not even looked at."""
    settings = TapSettings(None, None, 0, "00:00:00:00:00:00", 1500, True, None, None)
    record = TapRecord("lo", 1, made=False, former=settings, boot="another")
    asyncio.run(remove_taps([record]))


def test_no_tap_has_leaked_where_none_has_a_name_of_ours() -> None:
    assert asyncio.run(leaked_taps([], tag="kvmsec_ffffffff")) == []


def test_an_interface_without_ipv6_is_left_alone() -> None:
    assert ipv6.read("no-such-interface") is None
    ipv6.turn_off("no-such-interface")
    assert ipv6.own_addresses("no-such-interface") == []

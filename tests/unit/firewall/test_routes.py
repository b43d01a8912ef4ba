"""Addresses that a packet would be routed to, from the kernel's two tables."""

from firewall.routes import Target, ipv4_neighbours, ipv6_neighbours

HEADER = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"


def ipv4(*rows: str) -> list[str]:
    return [target.address for target in ipv4_neighbours(map(str.encode, (HEADER, *rows)))]


def test_a_connected_network_gives_two_addresses_inside_it():
    assert ipv4("eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0") == ["192.0.2.1", "192.0.2.2"]


def test_a_host_route_gives_its_address():
    assert ipv4("eth0 0100000A 00000000 0005 0 0 0 FFFFFFFF 0 0 0") == ["10.0.0.1"]


def test_a_link_of_two_gives_both_ends():
    assert ipv4("ppp0 0000000A 00000000 0001 0 0 0 FEFFFFFF 0 0 0") == ["10.0.0.0", "10.0.0.1"]


def test_default_reject_and_downed_routes_give_none():
    assert ipv4("eth0 00000000 0100000A 0003 0 0 0 00000000 0 0 0") == []
    assert ipv4("* 000200C0 00000000 0201 0 0 0 00FFFFFF 0 0 0") == []
    assert ipv4("eth0 000200C0 00000000 0000 0 0 0 00FFFFFF 0 0 0") == []
    assert ipv4("") == []


def ipv6(network: str, length: int, flags: int, interface: str = "eth0") -> list[Target]:
    zero = "0" * 32
    row = f"{network} {length:02x} {zero} 00 {zero} 00000100 00000001 00000000 {flags:08x}"
    return list(ipv6_neighbours([f"{row} {interface}".encode()]))


GLOBAL = "fd000000000000000000000000000000"
LINK_LOCAL = "fe800000000000000000000000000000"


def test_an_ipv6_network_gives_two_addresses_inside_it():
    assert [one.address for one in ipv6(GLOBAL, 64, 1)] == ["fd00::1", "fd00::2"]


def test_a_link_local_network_counts_and_names_its_interface():
    targets = ipv6(LINK_LOCAL, 64, 1, "lo0-is-not-here")
    assert [one.address for one in targets] == ["fe80::1", "fe80::2"]


def test_loopback_local_anycast_multicast_and_reject_give_none():
    assert ipv6(GLOBAL, 64, 1, "lo") == []
    assert ipv6(GLOBAL, 128, 0x80000001) == []
    assert ipv6(GLOBAL, 128, 0x00100001) == []
    assert ipv6("ff" + GLOBAL[2:], 8, 1) == []
    assert ipv6(GLOBAL, 64, 0x0201) == []
    assert ipv6(GLOBAL, 0, 1) == []


def test_a_scope_reaches_the_socket_address():
    assert Target("ipv6", "fe80::1", 7).socket_address == ("fe80::1", 9, 0, 7)
    assert Target("ipv4", "10.0.0.1").socket_address == ("10.0.0.1", 9)

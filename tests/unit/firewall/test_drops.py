"""Lines of the kernel's log, as the log rule of either backend writes them."""

from firewall.drops import parse_drops

POOL = ((220000, 220099),)
IPV4 = (
    "4,812,5000000,-;kvmsec-drop: IN= OUT=eth0 SRC=192.0.2.2 DST=198.51.100.7 LEN=60 TOS=0x00 "
    "PREC=0x00 TTL=64 ID=1 DF PROTO=TCP SPT=40000 DPT=25 WINDOW=64240 RES=0x00 SYN URGP=0 "
    "UID=220001 GID=220001 \n SUBSYSTEM=x\n"
)
IPV6_CANARY = (
    "4,813,6000000,-;kvmsec-drop: IN= OUT=lo SRC=::1 DST=::1 LEN=48 TC=0 HOPLIMIT=64 FLOWLBL=0 "
    "PROTO=UDP SPT=40001 DPT=9 LEN=8 UID=220002 GID=220002 MARK=0x1\n"
)


def test_a_line_says_who_what_and_where():
    (drop,) = parse_drops([IPV4], "kvmsec-drop: ", POOL, 1_000_000_000.0)
    assert drop.plain() == {
        "at": "2001-09-09T01:46:45.000+00:00",
        "uid": 220001,
        "interface": "eth0",
        "source": "192.0.2.2",
        "destination": "198.51.100.7",
        "protocol": "tcp",
        "port": 25,
        "is_canary": False,
    }


def test_our_own_canary_is_told_apart():
    (drop,) = parse_drops([IPV6_CANARY], "kvmsec-drop: ", POOL, 0)
    assert drop.is_canary
    assert drop.uid == 220002


def test_other_lines_are_passed_over_and_ten_are_kept():
    other = "6,1,2,-;eth0: link up kvmsec-drop: not ours\n"
    drops = parse_drops([other, *[IPV4] * 30, IPV6_CANARY], "kvmsec-drop: ", POOL, 0)
    assert len(drops) == 10
    assert drops[-1].is_canary


def test_an_icmp_line_has_no_port():
    (drop,) = parse_drops(
        ["4,1,2,-;p: OUT=lo SRC=a DST=b LEN=84 PROTO=ICMP TYPE=8\n"], "p: ", POOL, 0
    )
    assert (drop.port, drop.uid, drop.protocol) == (None, None, "icmp")


def test_drops_of_other_rules_with_the_same_prefix_are_passed_over():
    drops = parse_drops([IPV4, IPV6_CANARY], "kvmsec-drop: ", ((220002, 220002),), 0)
    assert [drop.uid for drop in drops] == [220002]

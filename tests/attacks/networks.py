"""The part of the table that is about sending, and being reached, over a network."""

from typing import Final

from tests.attacks.attack import Attack, Refusal, in_room
from tests.attacks.refusals import (
    CAPABILITIES,
    NETWORK,
    NO_SUCH_FAMILY,
    NOT_PERMITTED,
    OPEN,
    RULES,
    RULES_UNTOLD,
    TREE,
    UNREACHABLE_HERE,
)

NETWORKS: Final = in_room(
    "the network",
    *(
        Attack(f"tcp-{kind}", f"tcp {{{kind}}} 5000", UNREACHABLE_HERE, rules=RULES_UNTOLD)
        for kind in ("ipv4", "ipv6", "mapped", "loopback4", "loopback6")
    ),
    *(
        Attack(f"udp-{kind}", f"udp {{{kind}}} 5000", UNREACHABLE_HERE, rules=RULES)
        for kind in ("ipv4", "ipv6", "mapped", "loopback4", "loopback6")
    ),
    Attack("multicast-ipv4", "udp 239.77.0.1 5000", NETWORK, rules=RULES),
    Attack("multicast-ipv6", "udp ff0e::77 5000", UNREACHABLE_HERE, rules=RULES),
    *(
        Attack(
            f"icmp-{kind}",
            f"ping {{{kind}}}",
            NO_SUCH_FAMILY,
            second=Refusal("network namespace", "EACCES"),
            rules=rules,
        )
        for kind, rules in (
            ("ipv4", RULES),
            ("ipv6", RULES_UNTOLD),
            ("loopback4", RULES),
            ("loopback6", RULES_UNTOLD),
        )
    ),
    # No v4-mapped address here: neither kind of socket sends to one as to an IPv4 address.
    *(
        Attack(
            f"raw-{kind}",
            f"raw {{{kind}}}",
            NO_SUCH_FAMILY,
            second=CAPABILITIES,
            rules=CAPABILITIES,
        )
        for kind in ("ipv4", "ipv6", "loopback4", "loopback6")
    ),
    Attack("packet", "frame {wire}", NO_SUCH_FAMILY, second=CAPABILITIES, rules=CAPABILITIES),
    # No packet rule sees these.
    Attack("netlink", "netlink", NO_SUCH_FAMILY, second=OPEN, rules=OPEN),
    Attack("vsock", "vsock", NO_SUCH_FAMILY, second=OPEN, rules=OPEN),
    *(
        Attack(
            f"inbound-{kind}",
            f"be-called {address} 6000",
            Refusal("network namespace", "ETIMEDOUT"),
            rules=RULES_UNTOLD,
        )
        for kind, address in (("ipv4", "0.0.0.0"), ("ipv6", "::"))
    ),
    # It listens for IPv6, and is called over IPv4.
    Attack(
        "inbound-mapped",
        "be-called :: 6000 ipv4",
        Refusal("network namespace", "ETIMEDOUT"),
        rules=RULES_UNTOLD,
    ),
    *(
        Attack(
            f"inbound-{kind}",
            f"be-called-by-node {{{kind}}} 6000",
            Refusal("network namespace", answer),
            rules=RULES_UNTOLD,
        )
        for kind, answer in (("loopback4", "ETIMEDOUT"), ("loopback6", "EADDRNOTAVAIL"))
    ),
    # The rules are about what is sent: it may be told, and can't answer.
    *(
        Attack(
            f"inbound-udp-{kind}",
            f"be-told {address} 6000",
            Refusal("network namespace", "ETIMEDOUT"),
            rules=Refusal("network namespace alone", "succeeded"),
        )
        for kind, address in (("ipv4", "0.0.0.0"), ("ipv6", "::"))
    ),
    *(
        Attack(
            f"inbound-udp-{kind}",
            f"be-told-by-node {{{kind}}} 6000",
            Refusal("network namespace", answer),
            rules=Refusal("network namespace alone", "succeeded"),
        )
        for kind, answer in (("loopback4", "ETIMEDOUT"), ("loopback6", "EADDRNOTAVAIL"))
    ),
    *(
        Attack(
            f"syn-cookie-{kind}",
            f"answer-by-cookie {address} 6000",
            Refusal("network namespace", "UNSENT"),
            rules=Refusal("packet rules", "UNSENT"),
        )
        for kind, address in (("ipv4", "0.0.0.0"), ("ipv6", "::"))
    ),
    *(
        Attack(
            f"orphan-{kind}",
            f"leave-orphan {{{kind}}} 5000",
            UNREACHABLE_HERE,
            rules=Refusal("packet rules", "UNSENT"),
        )
        for kind in ("ipv4", "ipv6")
    ),
    Attack(
        "inherited-socket",
        "use-inherited",
        Refusal("descriptors", "NONE"),
        rules=Refusal("descriptors", "NONE"),
    ),
    Attack("open-tun", "open-to-write /dev/net/tun", TREE),
    Attack(
        "second-tap",
        "second-tap",
        NOT_PERMITTED,
        second=Refusal("descriptors", "EEXIST"),
    ),
    Attack("log-by-tap", "log-by-tap", NOT_PERMITTED, second=OPEN),
    # Behind these: the record names the tap, and the node takes it back whatever has become of it.
    *(
        Attack(name, name, NOT_PERMITTED, second=OPEN)
        for name in ("persist-tap", "give-tap", "group-of-tap", "address-of-tap", "carrier-of-tap")
    ),
    Attack("namespace-of-tap", "namespace-of-tap", CAPABILITIES, rules=CAPABILITIES),
    Attack("namespace-of-socket", "namespace-of-socket", NOT_PERMITTED, second=CAPABILITIES),
    Attack("interfaces-of-node", "interfaces-of-node", NOT_PERMITTED, second=OPEN),
    Attack(
        "interfaces-by-binding", "interfaces-by-binding {bridge_number}", NOT_PERMITTED, second=OPEN
    ),
)

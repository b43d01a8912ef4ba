"""What a NIC asks of the node, what it gets, and what is remembered of it."""

import os

from attrs import field, frozen

from kvmsec.linux.processes import boot_id
from kvmsec.node.ipv6 import Ipv6


@frozen
class TapRequest:
    """A NIC's side on the node: an existing tap, or a bridge to plug a new one into."""

    tap: str | None = None
    bridge: str | None = None
    vhost: bool = False

    def __attrs_post_init__(self) -> None:
        if (self.tap is None) == (self.bridge is None):
            raise ValueError("a NIC has either a tap or a bridge")


@frozen
class TapSettings:
    """What a tap is set to; `owner` and `group` None is nobody's, `master` an interface index."""

    owner: int | None
    group: int | None
    features: int
    mac: str
    mtu: int
    is_up: bool
    master: int | None
    ipv6: Ipv6 | None


@frozen
class TapRecord:
    """Enough to find a tap again, on the same boot, and to put it back as it was.

    `made`: it is kvmsec's own, to be deleted. `former`: what a borrowed one was set to.
    """

    name: str
    ifindex: int
    made: bool
    bridge: str | None = None
    former: TapSettings | None = None
    boot: str = field(factory=boot_id)


@frozen
class OpenTap:
    """A tap that an instance may have: the caller closes both descriptors once QEMU has them."""

    descriptor: int
    vhost_descriptor: int | None
    record: TapRecord

    def close(self) -> None:
        """Close the descriptors; a tap of our own that nobody else holds is gone then."""
        os.close(self.descriptor)
        if self.vhost_descriptor is not None:
            os.close(self.vhost_descriptor)

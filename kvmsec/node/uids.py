"""Who holds which uid of this node, and what is kept back."""

from collections.abc import Mapping

from kvmsec.agent import UidState
from kvmsec.node.host import Host


def held_uids(host: Host) -> Mapping[int, str]:
    return {}


def uid_states(host: Host, *, with_free: bool) -> tuple[UidState, ...]:
    return ()


def release_uid(host: Host, uid: int) -> UidState:
    raise NotImplementedError

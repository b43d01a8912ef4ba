"""The pool's users on this node: what to make, and what may be taken back."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from kvmsec.config import load_config
from kvmsec.errors import KvmsecError
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from uidpool import provision
from uidpool.accounts import AccountRules
from uidpool.claims import State, UidState
from uidpool.provision import Plan, Removal
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot


class StillInPool(KvmsecError):
    """Users can't be removed while their uids are in the pool of a cluster of this host."""

    def __init__(self, uids: UidRanges, root: Path) -> None:
        super().__init__(
            f"these uids are in the cluster's pool below {root}: {uids}",
            hint="take them out of it first: "
            f"kvmsec --root {root} cluster modify --remove-uids {uids}",
        )
        self.uids = uids
        self.root = root


def plan(paths: Paths, pool: UidRanges) -> Plan:
    """Which users of the pool are missing. Needs no root, but for a private kvmsec.toml.

    Raises BadConfig, UnfitUids, AccountConflict, ProvisionError, OSError.
    """
    return provision.plan(pool, Snapshot.read(), _rules(paths))


async def apply(wanted: Plan) -> None:
    """Make them, in one batch. Raises ProvisionError."""
    provision.apply(wanted)


def sysusers_file(paths: Paths, pool: UidRanges) -> str:
    """All users of the pool as a file for /etc/sysusers.d. Raises what `plan` raises.

    A file with a uid of somebody else's must not be shipped to other nodes, so it is judged here.
    """
    plan(paths, pool)
    return provision.sysusers_text(pool)


def _rules(paths: Paths) -> AccountRules:
    return AccountRules(load_config(paths.config).uids.freed_ranges)


def plan_removal(paths: Paths, pool: UidRanges) -> Removal:
    """Which users provisioning made that nobody holds.

    What is leased or quarantined counts as held, by whichever root of this host. Raises UidsInUse,
    and StillInPool for uids that the next start could draw.
    """
    host = Host(paths)
    known = host.claims.states()
    for root in _known_roots(host, known):
        cluster, _ = Host(Paths(root)).store.load()
        if cluster is not None and (drawable := pool & cluster.uid_pool):
            raise StillInPool(drawable, root)
    held = UidRanges.of_uids(one.uid for one in known if one.state is not State.RESTING)
    return provision.plan_removal(pool, Snapshot.read(), leased=held)


def _known_roots(host: Host, known: Iterable[UidState]) -> Iterator[Path]:
    """This root, the host's own, and those that a uid's record names.

    Nothing lists the roots of a host: one whose instances left no record is not found.
    """
    named = {one.root for one in known if one.root}
    yield from sorted({host.paths.root, Path("/"), *map(Path, named)})


async def remove(paths: Paths, pool: UidRanges) -> Removal:
    """Take them back; returns what was done. Raises UidsInUse, AccountsBusy, OSError."""
    removal = plan_removal(paths, pool)
    provision.remove(removal)
    return removal

"""The pool's users on this node: what to make, and what may be taken back."""

from kvmsec.config import load_config
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from uidpool import provision
from uidpool.accounts import AccountRules
from uidpool.claims import State
from uidpool.provision import Plan, Removal
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot


def plan(paths: Paths, pool: UidRanges) -> Plan:
    """Which users of the pool are missing. Needs no root, but for a private kvmsec.toml.

    Raises BadConfig, UnfitUids, AccountConflict, ProvisionError, OSError.
    """
    rules = AccountRules(load_config(paths.config).uids.freed_ranges)
    return provision.plan(pool, Snapshot.read(), rules)


async def apply(wanted: Plan) -> None:
    """Make them, in one batch. Raises ProvisionError."""
    provision.apply(wanted)


def sysusers_file(paths: Paths, pool: UidRanges) -> str:
    """All users of the pool as a file for /etc/sysusers.d. Raises what `plan` raises.

    Refused for a pool whose missing users this node would refuse to make: such a file must not be
    shipped to others either.
    """
    plan(paths, pool)
    return provision.sysusers_text(pool)


def plan_removal(paths: Paths, pool: UidRanges) -> Removal:
    """Which users provisioning made that nobody holds.

    What is leased or quarantined counts as held, by whichever root of this host. Raises UidsInUse.
    """
    known = Host(paths).claims.states()
    held = UidRanges.of_uids(one.uid for one in known if one.state is not State.RESTING)
    return provision.plan_removal(pool, Snapshot.read(), leased=held)


async def remove(paths: Paths, pool: UidRanges) -> Removal:
    """Take them back; returns what was done. Raises UidsInUse, AccountsBusy, OSError."""
    removal = plan_removal(paths, pool)
    provision.remove(removal)
    return removal

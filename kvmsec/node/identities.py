"""As whom an instance runs: nobody else's uid under `pool`, a named user's under `user`."""

from typing import Final

from attrs import frozen

from kvmsec.errors import KvmsecError, NoCluster
from kvmsec.linux.credentials import Credentials
from kvmsec.model.security import Security, SecurityModel
from kvmsec.node import leasing
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord
from uidpool.accounts import AccountRules, resolve_domain
from uidpool.claims import State
from uidpool.errors import UidHeld
from uidpool.ranges import EMPTY
from uidpool.snapshot import Account, find_account

_NOBODY: Final = Credentials(65534, 65534)  # Debian Policy 9.2.2
_DRAWS: Final = 8


@frozen
class Identity:
    """Whose process an instance's QEMU is; `inspector` looks at its images before it runs."""

    credentials: Credentials
    user: str
    inspector: Credentials

    @property
    def uid(self) -> int:
        return self.credentials.uid


class PoolChanges(KvmsecError):
    """Every uid that was drawn left the pool at the same time."""

    def __init__(self) -> None:
        super().__init__("the uid pool is being changed", hint="try again")


async def identity_for(host: Host, security: Security, record: InstanceRecord) -> Identity:
    """Decide as whom an instance runs; under `pool` this draws and leases its uid.

    Raises what `uidpool` raises: PoolExhausted, UnfitDomain, RecordNotWritten.
    """
    if security.model is SecurityModel.NONE:
        return Identity(Credentials(0, 0), "root", _NOBODY)
    account = (
        await _draw(host, record)
        if security.model is SecurityModel.POOL
        else _domain(host, str(security.domain))
    )
    credentials = Credentials(account.uid, account.gid)
    return Identity(credentials, account.name, credentials)


def _domain(host: Host, user: str) -> Account:
    cluster, _ = host.store.load()
    pool = cluster.guarded_uids if cluster else EMPTY
    account = resolve_domain(user, pool, AccountRules(host.config.uids.freed_ranges))
    _require_nobodys(host, account)
    return account


def _require_nobodys(host: Host, account: Account) -> None:
    """Refuse a uid that another root of this host has drawn: its stop would end ours as well."""
    for known in host.claims.states():
        if known.uid == account.uid and known.state is not State.RESTING:
            raise UidHeld(account.uid, f"{known.instance or 'nobody'} (root {known.root})")


async def _draw(host: Host, record: InstanceRecord) -> Account:
    """Draw a uid that is still in the pool once it is leased.

    A change of the pool looks at the leases after it was written, a start at the pool after its
    lease was: one of the two sees the other.
    """
    for _ in range(_DRAWS):
        cluster, _ = host.store.load()
        if cluster is None:
            raise NoCluster
        lease = await leasing.draw(
            host.claims,
            cluster.uid_pool,
            instance=record.name,
            generation=record.generation,
            reuse_delay_s=host.config.uids.reuse_delay_s,
        )
        now, _ = host.store.load()
        account = find_account(lease.uid)
        if account is not None and now is not None and lease.uid in now.uid_pool:
            return account
        await leasing.release(host.claims, lease.key)
        if account is None:
            raise MissingUser(lease.uid)
    raise PoolChanges


class MissingUser(KvmsecError):
    """A uid of the pool is no user of this node."""

    def __init__(self, uid: int) -> None:
        super().__init__(
            f"uid {uid} of the pool is no user of this node",
            hint=f"make it with `kvmsec uids provision {uid}`",
        )
        self.uid = uid

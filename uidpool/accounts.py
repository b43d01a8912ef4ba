"""Is a uid fit for the pool: does it exist, is it nobody else's, and can it do nothing?

Also which user an instance may run as that names one itself (the `user` model).
"""

import grp
import pwd
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from attrs import field, frozen

from kvmsec.linux.credentials import NOBODY
from uidpool.errors import UnfitDomain
from uidpool.foreign import foreign_parts, never_freed
from uidpool.ranges import EMPTY, LAST_UID, UidRanges
from uidpool.snapshot import Account, Snapshot, account_of, asked_gids

NO_LOGIN_SHELLS: Final = frozenset(
    {"/usr/sbin/nologin", "/sbin/nologin", "/usr/bin/false", "/bin/false"}
)

PRIVILEGED_GROUPS: Final = frozenset(
    {
        # Become root by design: sudo and its kin, the daemons that run containers and machines.
        *("root", "sudo", "wheel", "admin", "docker", "podman", "containerd", "microk8s"),
        *("lxd", "lxc", "incus", "incus-admin", "libvirt", "libvirtd", "libvirt-admin"),
        # Raw disks, memory, tapes, terminals and what is typed on them.
        *("disk", "floppy", "cdrom", "tape", "kmem", "sys", "tty", "input", "uinput"),
        # Files that hold secrets, or that root executes (Debian's staff writes to /usr/local).
        *("shadow", "staff", "ssl-cert", "backup", "bin", "daemon", "operator", "polkitd"),
        # Everybody's logs, and everybody's packets.
        *("adm", "systemd-journal", "wireshark", "pcap", "netdev"),
        # May change what the devices and the boot do.
        *("systemd-network", "systemd-resolve", "plugdev", "lpadmin"),
    }
)
"""Groups whose members can become root, or read or change what is everybody's.

Debian's SystemGroups page describes most of them. `kvm` is not among them: it opens /dev/kvm, which
an instance is given anyway. `video`, `render` and `audio` open one user's devices, not the host.
"""

_SHOWN_RANGES: Final = 5
_SHOWN_NAMES: Final = 3
_NO_UID: Final = 65535  # What -1 is to a program with 16 bits for a uid.
_RESERVED_NAME: Final = "kvmsec-"


@frozen
class AccountRules:
    """What the configuration says about accounts.

    `freed` are uids that foreign.FOREIGN gives to somebody who isn't on this node. Raises
    ValueError when it holds some that nobody can free.
    """

    freed: UidRanges = field(default=EMPTY)
    privileged_groups: frozenset[str] = PRIVILEGED_GROUPS

    @freed.validator
    def _check_freed(self, _: object, freed: UidRanges) -> None:
        if kept := freed & never_freed():
            raise ValueError(f"uids {_shown(kept)} can't be freed for a pool")


@frozen
class Problem:
    """Why some uids are unfit: all those that share a reason, a stable code, and what to do."""

    uids: UidRanges
    code: str
    message: str
    hint: str


def check_pool(
    pool: UidRanges, rules: AccountRules, *, only: UidRanges | None = None
) -> tuple[Problem, ...]:
    """What makes uids of the pool unfit on this host; nothing when all are fit.

    `only` narrows it to some of them. Raises OSError when the accounts can't be read.
    """
    subject = pool if only is None else pool & only
    snapshot = Snapshot.read(only=only).with_asked(subject)
    return tuple(find_problems(subject, rules, snapshot))


def find_lasting_problems(uid: int) -> tuple[Problem, ...]:
    """What makes a uid unfit for a pool, whichever ranges the configuration frees.

    A foreign range that could be freed counts no longer; who has a user, a subordinate range or a
    service there does. Raises OSError when the accounts can't be read.
    """
    own = UidRanges.of((uid, uid))
    return check_pool(own, AccountRules(freed=own - never_freed()), only=own)


def find_problems(uids: UidRanges, rules: AccountRules, snapshot: Snapshot) -> Iterator[Problem]:
    """The same as a function of its arguments: at most one problem for a reason and its owner."""
    for part, owner in foreign_parts(uids, rules.freed):
        yield Problem(
            part,
            "foreign-range",
            f"{_shown(part)} belongs to {owner}",
            "choose other uids, or free the range in the configuration where nobody uses it",
        )
    yield from _given_out(uids, snapshot)
    yield from _missing(uids, snapshot)
    yield from _unfit_users(uids, rules, snapshot)


def _given_out(uids: UidRanges, snapshot: Snapshot) -> Iterator[Problem]:
    """Uids inside somebody's subordinate ranges, or given out by systemd for now."""
    for file in dict.fromkeys(one.file for one in snapshot.delegations):
        inside = [
            one
            for one in snapshot.delegations
            if one.file == file and not one.uids.isdisjoint(uids)
        ]
        if inside:
            part = uids & UidRanges(tuple(pair for one in inside for pair in one.uids.ranges))
            owners = _listed(one.owner for one in inside)
            yield Problem(
                part,
                "subordinate-range",
                f"{_shown(part)} lies in a range that {file} gives to {owners}",
                f"choose other uids, or take that range out of {file}",
            )
    for owner in dict.fromkeys(owner for _, owner in snapshot.running):
        ranges = [
            pair for part, whose in snapshot.running if whose == owner for pair in part.ranges
        ]
        if part := uids & UidRanges(tuple(ranges)):
            yield Problem(
                part, "in-use", f"{_shown(part)} is in use by {owner}", "choose other uids"
            )


def _missing(uids: UidRanges, snapshot: Snapshot) -> Iterator[Problem]:
    missing = uids - snapshot.uids()
    hint = f"make the users: kvmsec uids provision {missing}"
    if asked := missing - snapshot.unasked:
        yield Problem(asked, "missing", f"{_shown(asked)}: no such user", hint)
    if unasked := missing & snapshot.unasked:
        why = "not in /etc/passwd, and too many to ask the name service for each"
        yield Problem(unasked, "missing", f"{_shown(unasked)}: {why}", hint)


def _unfit_users(uids: UidRanges, rules: AccountRules, snapshot: Snapshot) -> Iterator[Problem]:
    known = [uid for uid in snapshot.by_uid if uid in uids]
    context = _Context(rules, snapshot)
    for code, (words, hint, is_unfit) in context.checks().items():
        unfit = [uid for uid in known if is_unfit(uid)]
        if unfit:
            part = UidRanges.of_uids(unfit)
            yield Problem(part, code, f"{_shown(part)}: {words}", hint)


class _Context:
    """The checks of a user against all others, with what they share worked out once."""

    def __init__(self, rules: AccountRules, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        foreign = foreign_parts(EMPTY.complement(), rules.freed)
        self._foreign = UidRanges(tuple(pair for part, _ in foreign for pair in part.ranges))
        self._owners = frozenset(one.owner for one in snapshot.delegations)
        self._primary: dict[int, set[int]] = {}
        for uid, users in snapshot.by_uid.items():
            for user in users:
                self._primary.setdefault(user.gid, set()).add(uid)

    def checks(self) -> dict[str, tuple[str, str, Callable[[int], bool]]]:
        again = "give it to nobody else, or choose another uid"
        return {
            "shared-uid": ("more than one user has this uid", again, self._is_shared),
            "login-shell": (
                "the user has a login shell",
                "choose other uids, or take the shell away: usermod --shell /usr/sbin/nologin USER",
                self._has_login_shell,
            ),
            "primary-group": (
                "the primary group is not the user's own",
                "give the user a group that nobody else is in",
                self._has_no_own_group,
            ),
            "supplementary-group": (
                "the user is in more groups than its own",
                "take it out: gpasswd --delete USER GROUP",
                self._has_supplementary_groups,
            ),
            "subordinate-ids": (
                "the user has an entry in /etc/subuid or /etc/subgid",
                "remove the user's lines there",
                self._has_subordinate_ids,
            ),
        }

    def _users(self, uid: int) -> tuple[Account, ...]:
        return self._snapshot.by_uid[uid]

    def _is_shared(self, uid: int) -> bool:
        return len(self._users(uid)) > 1

    def _has_login_shell(self, uid: int) -> bool:
        return any(user.shell not in NO_LOGIN_SHELLS for user in self._users(uid))

    def _has_no_own_group(self, uid: int) -> bool:
        return any(not self._owns_group(user) for user in self._users(uid))

    def _owns_group(self, user: Account) -> bool:
        group = self._snapshot.groups.get(user.gid)
        return (
            group is not None
            and not set(group.members) - {user.name}
            and self._primary[user.gid] == {user.uid}
            and user.gid not in self._foreign
        )

    def _has_supplementary_groups(self, uid: int) -> bool:
        supplementary = self._snapshot.supplementary
        return any(
            gid != user.gid for user in self._users(uid) for gid in supplementary.get(user.name, ())
        )

    def _has_subordinate_ids(self, uid: int) -> bool:
        return any({user.name, str(uid)} & self._owners for user in self._users(uid))


def resolve_domain(user: str, pool: UidRanges, rules: AccountRules) -> Account:
    """The account that a security domain names, if an instance may run as it.

    Raises UnfitDomain for an unknown user, root, a uid of the pool or that several programs share,
    and a member of a privileged group.
    """
    if not user or "\0" in user:
        raise UnfitDomain(user, "is no user name", "name an existing, unprivileged user")
    try:
        account = account_of(pwd.getpwnam(user))
    except (KeyError, UnicodeEncodeError):
        hint = "name an existing user, or make one: adduser --system --group NAME"
        raise UnfitDomain(user, "there is no such user", hint) from None
    if reason := _why_unfit(account, pool, rules):
        hint = "name an unprivileged user of its own, or use the security model pool"
        raise UnfitDomain(user, reason, hint)
    return account


def _why_unfit(account: Account, pool: UidRanges, rules: AccountRules) -> str | None:
    if account.uid == 0 or account.gid == 0:
        return "it is root, or in root's group"
    if account.uid in pool:
        return f"its uid {account.uid} belongs to the cluster's pool"
    if account.name.startswith(_RESERVED_NAME):
        return "kvmsec keeps that user for itself"
    if account.uid > LAST_UID or account.uid in (NOBODY, _NO_UID):
        return f"uid {account.uid} is shared by many programs or unsafe to use"
    names = [_group_name(gid) for gid in (account.gid, *asked_gids(account))]
    if held := [name for name in names if name in rules.privileged_groups]:
        return f"it is in the privileged group {_listed(held)}"
    return None


def _group_name(gid: int) -> str:
    if gid == 0:
        return "root"
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _shown(uids: UidRanges) -> str:
    """The uids as text, the first few ranges of many."""
    shown = UidRanges(uids.ranges[:_SHOWN_RANGES])
    left_out = uids.size() - shown.size()
    noun = "uid" if uids.size() == 1 else "uids"
    return f"{noun} {shown}" + (f" and {left_out} more" if left_out else "")


def _listed(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    shown = ", ".join(ascii(name)[1:-1] for name in every[:_SHOWN_NAMES])
    left_out = len(every) - _SHOWN_NAMES
    return shown + (f" and {left_out} more" if left_out > 0 else "")

"""The pool's users: made in one batch by systemd-sysusers, and taken back.

Not by newusers(8): it gives each user a range in /etc/subuid, which makes a uid unfit for a pool.
"""

import pwd
import re
from collections import Counter
from typing import Final

from attrs import frozen

from kvmsec.linux import command
from kvmsec.linux.errors import CommandFailed, CommandTimedOut
from uidpool import userdb
from uidpool.accounts import AccountRules, find_problems
from uidpool.errors import AccountConflict, ProvisionError, UidsInUse, UnfitUids
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Account, Snapshot

PREFIX: Final = "kvmsec-"
REAPER: Final = "kvmsec-reaper"
"""The system user that ends a pool uid's processes; never in a pool, since below 1000."""
HOME: Final = "/nonexistent"
SHELL: Final = "/usr/sbin/nologin"
GECOS: Final = "kvmsec instance"
REAPER_GECOS: Final = "kvmsec reaper"
MOST_USERS: Final = 65536

_TIMEOUT_S: Final = 600
_SHOWN_CONFLICTS: Final = 5
_USER_NAME: Final = re.compile(r"kvmsec-[1-9][0-9]{0,9}", re.ASCII)


@frozen
class Plan:
    """What `apply` would do: users to make, those that exist already, and whether the reaper."""

    create: UidRanges
    present: UidRanges
    makes_reaper: bool


@frozen
class Removal:
    """What `remove` would do: users to delete, those left as they are, and whether the reaper.

    `kept` are uids of the pool with a user that provisioning didn't make or that somebody changed.
    """

    remove: UidRanges
    kept: UidRanges
    removes_reaper: bool


def user_name(uid: int) -> str:
    """The name of the user that provisioning makes for a uid."""
    return f"{PREFIX}{uid}"


def plan(pool: UidRanges, snapshot: Snapshot, rules: AccountRules | None = None) -> Plan:
    """What is missing of the pool's users.

    Raises UnfitUids when a uid to be made is somebody else's or a user that is there is unfit,
    AccountConflict when a name or a group is taken, and ProvisionError for more than 65,536 users.
    """
    rules = rules or AccountRules()
    unfinished = [
        uid
        for uid, users in snapshot.by_uid.items()
        if uid in pool and users[0].name == user_name(uid) and users[0].gid not in snapshot.groups
    ]
    create = (pool - snapshot.uids()) | UidRanges.of_uids(unfinished)
    if create.size() > MOST_USERS:
        raise ProvisionError(
            f"{create.size()} users are missing, and {MOST_USERS} are the most to be made at once",
            hint="use a smaller pool: a uid is needed for each instance of a node, and a few more",
        )
    present = pool - create
    made_good = ("missing", "primary-group")
    unfit = [one for one in find_problems(create, rules, snapshot) if one.code not in made_good]
    if unfit := [*unfit, *find_problems(present, rules, snapshot)]:
        raise UnfitUids(unfit)
    if conflicts := _conflicts(create, snapshot):
        raise AccountConflict(conflicts)
    return Plan(create, present, makes_reaper=REAPER not in snapshot.by_name)


def _conflicts(create: UidRanges, snapshot: Snapshot) -> list[str]:
    """Names and groups that are taken; systemd-sysusers would quietly choose another gid."""
    found = []
    for user in snapshot.by_name.values():
        uid = uid_of(user.name)
        if uid is not None and uid in create and user.uid != uid:
            found.append(f"the user {user.name} has uid {user.uid}")
    for group in snapshot.groups.values():
        uid = uid_of(group.name)
        if uid is not None and uid in create and group.gid != uid:
            found.append(f"the group {group.name} has gid {group.gid}")
        if group.gid in create and group.name != user_name(group.gid):
            found.append(f"gid {group.gid} is the group {group.name!a}'s")
    left_out = len(found) - _SHOWN_CONFLICTS
    return found[:_SHOWN_CONFLICTS] + ([f"and {left_out} more"] if left_out > 0 else [])


def uid_of(name: str) -> int | None:
    """The uid that a user of this name is made for; None when the name isn't ours."""
    return int(name.removeprefix(PREFIX)) if _USER_NAME.fullmatch(name) else None


def sysusers_text(uids: UidRanges) -> str:
    """The users as a file for /etc/sysusers.d (sysusers.d(5)), the reaper's first."""
    lines = [f'u {REAPER} - "{REAPER_GECOS}" {HOME} {SHELL}']
    lines += [f'u {user_name(uid)} {uid} "{GECOS}" {HOME} {SHELL}' for uid in uids]
    return "\n".join(lines) + "\n"


def apply(wanted: Plan) -> None:
    """Make what the plan lacks, in one run of systemd-sysusers; what exists is left alone.

    About half a second for 1,000 users. Raises ProvisionError when the users aren't there after.
    """
    if not wanted.create and not wanted.makes_reaper:
        return
    text = sysusers_text(wanted.create).encode()
    try:
        command.run(["systemd-sysusers", "-"], input=text, timeout_s=_TIMEOUT_S)
    except FileNotFoundError:
        raise ProvisionError(
            "there is no systemd-sysusers on this host",
            hint="install it (apt install systemd), or print what is to be made: --format sysusers",
        ) from None
    except (CommandFailed, CommandTimedOut) as error:
        raise ProvisionError(error.message, hint="see whether /etc can be written") from error
    _prove(wanted.create)


def _prove(made: UidRanges) -> None:
    snapshot = Snapshot.read()
    wrong = [uid for uid in made if _entry(uid) not in snapshot.by_uid.get(uid, ())]
    if wrong or find_reaper(snapshot) is None:
        what = user_name(wrong[0]) if wrong else REAPER
        raise ProvisionError(
            f"systemd-sysusers did not make {what} as it was told",
            hint="look for a rule about that user in /etc/sysusers.d",
        )


def _entry(uid: int) -> Account:
    return Account(uid, uid, user_name(uid), HOME, SHELL, GECOS)


def find_reaper(snapshot: Snapshot) -> Account | None:
    """The reaper's account; None when it is missing or isn't what provisioning makes."""
    account = snapshot.by_name.get(REAPER)
    if account is None or account.uid == 0 or account.gid == 0:
        return None
    made = Account(account.uid, account.gid, REAPER, HOME, SHELL, REAPER_GECOS)
    is_alone = snapshot.by_uid.get(account.uid) == (account,)
    return account if account == made and is_alone else None


def look_up_reaper() -> Account | None:
    """The reaper's account, without reading all the others; None as with `find_reaper`."""
    try:
        uid = pwd.getpwnam(REAPER).pw_uid
    except KeyError:
        return None
    return find_reaper(Snapshot.read(only=UidRanges.of((uid, uid))))


def plan_removal(pool: UidRanges, snapshot: Snapshot, *, leased: UidRanges = EMPTY) -> Removal:
    """Which users of the pool provisioning made, and nobody changed since.

    Raises UidsInUse when instances hold some of them (`leased`).
    """
    ours = _ours(pool, snapshot)
    if held := ours & leased:
        raise UidsInUse(str(held))
    made = UidRanges.of_uids(uid for name in snapshot.by_name if (uid := uid_of(name)) is not None)
    return Removal(
        remove=ours,
        kept=(pool & snapshot.uids()) - ours,
        removes_reaper=not made - ours and find_reaper(snapshot) is not None,
    )


def _ours(pool: UidRanges, snapshot: Snapshot) -> UidRanges:
    """The uids whose user and group are as they were made; a group alone is what a crash left.

    Names must be unique, since entries are deleted by name.
    """
    users = Counter(user.name for same in snapshot.by_uid.values() for user in same)
    groups = Counter(group.name for group in snapshot.groups.values())

    def is_ours(uid: int) -> bool:
        name, group = user_name(uid), snapshot.groups.get(uid)
        if name in snapshot.supplementary or users[name] > 1 or groups[name] > 1:
            return False
        if snapshot.by_uid.get(uid, ()) not in ((), (_entry(uid),)):
            return False
        if group is None:
            return uid in snapshot.by_uid and not groups[name]
        is_unchanged = group.name == name and not group.members
        return is_unchanged and (uid in snapshot.by_uid or not users[name])

    candidates = {*snapshot.by_uid, *snapshot.groups}
    return UidRanges.of_uids(uid for uid in candidates if uid in pool and is_ours(uid))


def remove(wanted: Removal) -> None:
    """Delete these users and their groups in one go, under the lock of the account tools.

    Raises AccountsBusy when another program is changing the accounts, and OSError (what is in the
    files then is what was there, or the start of the removal: do it again).
    """
    names = {user_name(uid) for uid in wanted.remove}
    if wanted.removes_reaper:
        names.add(REAPER)
    if not names:
        return
    with userdb.locked():
        # What changed since the plan was made is nobody's to delete.
        snapshot = Snapshot.read()
        still = {user_name(uid) for uid in _ours(wanted.remove, snapshot)}
        if wanted.removes_reaper and find_reaper(snapshot) is not None:
            still.add(REAPER)
        userdb.remove_entries(still)

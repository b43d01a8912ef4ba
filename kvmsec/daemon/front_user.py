"""The system user that the front and the courier run as: of its own, and able to do nothing."""

import grp
import pwd

from kvmsec.errors import KvmsecError
from kvmsec.linux.credentials import Credentials
from uidpool.accounts import PRIVILEGED_GROUPS, find_lasting_problems
from uidpool.ranges import UidRanges


class UnfitFrontUser(KvmsecError):
    """The front has no user that it may run as."""

    def __init__(self, user: str, reason: str, hint: str) -> None:
        super().__init__(f"the front can't run as {user}: {reason}", hint=hint)
        self.user = user
        self.reason = reason


def find_front_user(user: str, pool: UidRanges) -> Credentials:
    """The credentials of the front's user (`node.front_user`).

    `pool` holds the uids of the cluster, those that leave it too. Raises UnfitFrontUser: there is
    no such user, it is root, of the pool, in a group that isn't its own, may log in, or shares its
    uid; OSError where the accounts can't be read.
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise UnfitFrontUser(
            user,
            "there is no such user",
            "make it: useradd --system --user-group --no-create-home --home-dir /nonexistent "
            f"--shell /usr/sbin/nologin {user}",
        ) from None
    if account.pw_uid == 0 or account.pw_gid == 0:
        raise UnfitFrontUser(user, "it is root, or in root's group", _another(user))
    if account.pw_uid in pool:
        raise UnfitFrontUser(
            user, f"its uid {account.pw_uid} is in the cluster's pool", _another(user)
        )
    for problem in find_lasting_problems(account.pw_uid):
        # A system user and its group lie where the distribution's do, which no pool's may.
        if problem.code not in ("foreign-range", "primary-group"):
            raise UnfitFrontUser(user, problem.message, problem.hint)
    if others := _others_in_group(account):
        reason = f"its group {account.pw_gid} is that of others as well: {', '.join(others)}"
        raise UnfitFrontUser(user, reason, _another(user))
    return Credentials(account.pw_uid, account.pw_gid)


def _others_in_group(account: pwd.struct_passwd) -> list[str]:
    """Who else is in the user's own group; who is named there, or has it for the primary one."""
    try:
        group = grp.getgrgid(account.pw_gid)
    except KeyError:
        return []
    members = {
        *group.gr_mem,
        *(one.pw_name for one in pwd.getpwall() if one.pw_gid == group.gr_gid),
    }
    others = members - {account.pw_name}
    return sorted({*others, *({group.gr_name} & PRIVILEGED_GROUPS)})[:3]


def _another(user: str) -> str:
    return f"delete it (userdel {user}) and make it again as a system user: useradd --system"

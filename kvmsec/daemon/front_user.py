"""The system user that the front and the courier run as: of its own, and able to do nothing."""

import pwd

from kvmsec.errors import KvmsecError
from kvmsec.linux.credentials import Credentials
from uidpool.accounts import find_lasting_problems
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
        # A system user lies where the distribution's users do, which no pool may.
        if problem.code != "foreign-range":
            raise UnfitFrontUser(user, problem.message, problem.hint)
    return Credentials(account.pw_uid, account.pw_gid)


def _another(user: str) -> str:
    return f"delete it (userdel {user}) and make it again as a system user: useradd --system"

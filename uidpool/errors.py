"""What may be wrong with a uid or the pool; every error keeps what a caller decides by."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsec.linux.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uidpool.accounts import Problem
    from uidpool.ranges import SyntaxProblem


class UidPoolError(Fault):
    """The root of what this package raises on purpose; plain system call failures stay OSError."""


class RangeSyntaxError(UidPoolError):
    """A text is not a pool; `problems` names its bad parts, `left_out` counts those past ten."""

    def __init__(self, problems: Sequence[SyntaxProblem], left_out: int = 0) -> None:
        self.problems = tuple(problems)
        self.left_out = left_out
        said = [str(problem) for problem in self.problems]
        if left_out:
            said.append(f"and {left_out} more bad parts")
        super().__init__(
            "not a uid pool: " + "; ".join(said),
            hint="write uids and inclusive ranges, separated by commas: 1000-5000,8000,9000-9010",
        )


class UnfitUids(UidPoolError):
    """Some uids may not be in the pool; `problems` says which and why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        hints = dict.fromkeys(problem.hint for problem in self.problems)
        super().__init__(
            "the pool has unfit uids: " + "; ".join(problem.message for problem in self.problems),
            hint="; ".join(hints) or None,
        )


class UnfitDomain(UidPoolError):
    """A security domain names a user that no instance may run as."""

    def __init__(self, user: str, reason: str, hint: str) -> None:
        super().__init__(f"security domain {user[:64]!r}: {reason}", hint=hint)
        self.user = user
        self.reason = reason


class ProvisionError(UidPoolError):
    """The pool's users could not be made or taken back."""


class AccountConflict(ProvisionError):
    """Users or groups of somebody else's are in the way; nothing was changed."""

    def __init__(self, conflicts: Sequence[str]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__(
            "can't provision: " + "; ".join(self.conflicts),
            hint="choose other uids, or remove these accounts",
        )


class UidsInUse(ProvisionError):
    """Users can't be removed while instances hold their uids (`uids`, as text)."""

    def __init__(self, uids: str) -> None:
        super().__init__(
            f"instances hold these uids: {uids}", hint="stop those instances, then try again"
        )
        self.uids = uids


class AccountsBusy(ProvisionError):
    """Somebody else is changing the accounts."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"the accounts are being changed by another program (it holds {path})",
            hint="wait until it has ended, then try again",
        )
        self.path = path


class ClaimsError(UidPoolError):
    """A uid could not be drawn, held or released."""


class PoolExhausted(ClaimsError):
    """No uid of the pool may be drawn; the counts say why.

    None of them is resting: one that rests is drawn before the pool counts as exhausted.
    """

    def __init__(self, *, size: int, leased: int, quarantined: int) -> None:
        super().__init__(
            f"no uid of the pool is free: of {size}, {leased} leased, 0 resting, {quarantined} "
            "quarantined",
            hint="stop an instance, add uids to the pool (kvmsec cluster modify --add-uids), or "
            "see what is quarantined and why (kvmsec uids list)",
        )
        self.size = size
        self.leased = leased
        self.quarantined = quarantined


class NoCleanUid(ClaimsError):
    """Uids were drawn and none was clean; they are quarantined. `reasons` says why, uid by uid."""

    def __init__(self, reasons: dict[int, str]) -> None:
        said = "; ".join(f"uid {uid}: {reason}" for uid, reason in reasons.items())
        super().__init__(
            f"no clean uid was found: {said}",
            hint="clean what is named, then run: kvmsec uids release UID",
        )
        self.reasons = dict(reasons)


class UidHeld(ClaimsError):
    """A uid is leased to another instance than the one that asks for it."""

    def __init__(self, uid: int, holder: str) -> None:
        super().__init__(
            f"uid {uid} is held by {holder}",
            hint="see who holds what: kvmsec uids list",
        )
        self.uid = uid
        self.holder = holder


class RecordUnreadable(ClaimsError):
    """A lease or quarantine record can't be read; its uid counts as taken until that is settled."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: {problem}",
            hint="its uid is not drawn; look for what runs under it, then: kvmsec uids release "
            + path.name,
        )
        self.path = path
        self.problem = problem


class RecordNotWritten(ClaimsError):
    """A record could not be written, so nothing was drawn or released. `cause` is the OSError."""

    def __init__(self, path: Path, cause: OSError) -> None:
        number = cause.errno or 0
        super().__init__(
            f"{path}: {os.strerror(number)}; nothing was changed", hint=_hint_of(number, path)
        )
        self.path = path
        self.cause = cause


def _hint_of(number: int, path: Path) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space (or inodes: df -i) on the filesystem of {path.parent}"
    if number == errno.EROFS:
        return f"{path.parent} must be on a filesystem that can be written"
    if number in (errno.EACCES, errno.EPERM):
        return "run as root"
    return f"check that {path.parent} can be written"


class NotSweepable(UidPoolError):
    """A uid that may not be swept (everything of it killed) was about to be."""

    def __init__(self, uid: int, reason: str) -> None:
        super().__init__(
            f"refused to end all processes of uid {uid}: {reason}",
            hint="if the uid is somebody else's, the record that names it is damaged: remove it "
            "from /run/kvmsec/uids; else make its user fit for the pool again",
        )
        self.uid = uid
        self.reason = reason

"""What is verified: the state, and what each member said of itself."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Final

from attrs import frozen

from kvmsec.model.cluster import Cluster, Member
from kvmsec.rpc.messages import Examination

WARN_DAYS: Final = 30
ERROR_DAYS: Final = 7
"""How long before its end a certificate is told of: the reference's `SSL_CERT_EXPIRATION_…`."""


@frozen
class Heard:
    """A member's answer, and when it was asked for and came, by the clock of whoever asked."""

    examination: Examination
    asked_at: datetime
    heard_at: datetime


@frozen
class Unheard:
    """A member that said nothing of itself; `is_refusal` says that it, or we, would not talk.

    `hint` is the refusal's own, where it has one.
    """

    reason: str
    is_refusal: bool
    hint: str | None = None


@frozen(kw_only=True)
class Subject:
    """The cluster as it is to be, in revision `revision`, and what each member said, by its name.

    `now` is the time of whoever verifies; `copy_valid_s` how long a copy counts unconfirmed.
    `awaited` has the names of those that a renewal waits for, as the master's journal has them.
    """

    cluster: Cluster
    revision: int
    now: datetime
    copy_valid_s: float
    answers: Mapping[str, Heard | Unheard]
    awaited: Collection[str] = ()

    def admit_again(self, member: Member) -> str:
        """What gives a member its files again; the master's come from whoever is the next one."""
        if member.uuid != self.cluster.master:
            return f"`kvmsec node readd {member.name}`"
        return (
            "put back a copy of it, or run `kvmsec cluster master-failover --force` on another "
            f"candidate, then `kvmsec node readd {member.name}` there"
        )

    def heard(self) -> list[tuple[Member, Examination]]:
        """The members that answered, and what they said."""
        return [
            (member, answer.examination)
            for member in self.cluster.nodes
            if isinstance(answer := self.answers.get(member.name), Heard)
        ]

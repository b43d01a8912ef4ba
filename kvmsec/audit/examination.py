"""The whole audit of one process, or of every QEMU: read, judge, sum up."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import asdict, evolve, frozen

from kvmsec.audit.discovery import find_qemus
from kvmsec.audit.facts import Facts
from kvmsec.audit.packets import cover, try_rules
from kvmsec.audit.points import judge
from kvmsec.audit.process_files import ProcessGone
from kvmsec.audit.reading import ProcessChanges, nothing_read, read_facts
from kvmsec.audit.score import Finding, rating, score


@frozen(kw_only=True)
class Report:
    """What an audit of one process came to; `score` is 0.0 (sealed) to 10.0.

    `uid` is None when it could not be read; `unread` names the parts that could not be.
    """

    pid: int
    name: str
    instance: str | None
    uid: int | None
    user: str | None
    executable: str | None
    score: float
    rating: str
    unread: Mapping[str, str]
    findings: tuple[Finding, ...]

    def plain(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self)


@frozen
class Subject:
    """A process to audit, and which instance of the node's it is, if any.

    `sockets` are the paths of an instance's sockets.
    """

    pid: int
    instance: str | None = None
    tolerated: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()


def examine(subject: Subject, *, with_canary: bool = False) -> Report:
    """Audit one process; the caller has one thread.

    Raises ProcessGone, ProcessChanges and ManyThreads.
    """
    return _finish([_read(subject)], with_canary)[0]


def examine_all(instances: Iterable[Subject] = (), *, with_canary: bool = False) -> list[Report]:
    """Audit every QEMU of this host, one after the other; one that ends meanwhile is passed over.

    One that changes all the time is reported with nothing read of it, which counts as the worst:
    it is not to hide so. `instances` are those of the node's. The caller has one thread. Raises
    ManyThreads.
    """
    known = {subject.pid: subject for subject in instances}
    found = []
    for pid in sorted({*find_qemus(), *known}):
        subject = known.get(pid, Subject(pid))
        with contextlib.suppress(ProcessGone):
            try:
                found.append(_read(subject))
            except ProcessChanges as change:
                found.append(_known_as(subject, nothing_read(pid, change.message)))
    return _finish(found, with_canary)


def _read(subject: Subject) -> Facts:
    return _known_as(subject, read_facts(subject.pid, sockets=subject.sockets))


def _known_as(subject: Subject, facts: Facts) -> Facts:
    return evolve(facts, instance=subject.instance, tolerated=subject.tolerated)


def _finish(read: Sequence[Facts], with_canary: bool) -> list[Report]:
    covered = cover(read)
    return [report_on(try_rules(facts) if with_canary else facts) for facts in covered]


def report_on(facts: Facts) -> Report:
    """Judge what was read (pure)."""
    findings = judge(facts)
    total = score(findings)
    who = facts.credentials
    return Report(
        pid=facts.pid,
        name=facts.name,
        instance=facts.instance,
        uid=who.uid if who else None,
        user=who.user if who else None,
        executable=facts.executable,
        score=total,
        rating=rating(total),
        unread=facts.unread,
        findings=findings,
    )

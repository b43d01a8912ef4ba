"""Whether each member answers, belongs here, keeps the time, and has the state: pure."""

from collections.abc import Iterator
from datetime import timedelta

from kvmsec.agent import Finding
from kvmsec.cluster.verify.codes import found
from kvmsec.cluster.verify.subject import Heard, Subject, Unheard
from kvmsec.model.cluster import Member
from kvmsec.rpc.messages import NodeInfo
from kvmsec.store.freshness import SKEW_S


def check_answers(subject: Subject) -> Iterator[Finding]:
    """Who does not answer, or is on its way out."""
    for member in subject.cluster.nodes:
        if member.is_leaving:
            hint = f"finish it with `kvmsec node remove {member.name}`, or keep the node with "
            hint += f"`kvmsec node readd {member.name}`"
            message = "its removal was begun and not finished"
            yield found("node-leaving", "warning", member.name, "membership", message, hint)
        match subject.answers.get(member.name):
            case Unheard(reason, is_refusal=True, hint=better):
                hint = "compare clocks and certificates; `kvmsec node readd NAME` mends it"
                hint = better or hint.replace("NAME", member.name)
                yield found("node-refused", "error", member.name, "answer", reason, hint)
            case Heard():
                pass
            case answer:
                reason = answer.reason if answer is not None else "it was not asked"
                hint = "start `kvmsec node serve` there; if it is gone for good, `kvmsec node "
                hint += f"remove {member.name} --force`"
                yield found("node-silent", "error", member.name, "answer", reason, hint)


def check_identity(subject: Subject) -> Iterator[Finding]:
    """Whether a node is the one that the state has under its name."""
    for member, said in subject.heard():
        if said.info.cluster_uuid != subject.cluster.uuid or said.info.uuid != member.uuid:
            message = f"it says that it is {said.info.uuid} of the cluster {said.info.cluster_uuid}"
            hint = f"`kvmsec node readd {member.name}`"
            yield found("node-foreign", "error", member.name, "membership", message, hint)
        for words in said.unreadable:
            hint = f"{subject.admit_again(member)}; `kvmsec doctor` there"
            yield found("node-unreadable", "error", member.name, "examination", words, hint)


def check_clocks(subject: Subject) -> Iterator[Finding]:
    """A node's clock must lie between asking and hearing, give or take what clocks may differ."""
    for member in subject.cluster.nodes:
        answer = subject.answers.get(member.name)
        if not isinstance(answer, Heard):
            continue
        time = answer.examination.info.time
        behind, ahead = answer.asked_at - time, time - answer.heard_at
        off = max(behind, ahead)
        if off.total_seconds() > SKEW_S:
            where = "behind" if behind > ahead else "ahead of"
            message = f"its clock is {_seconds(off)} s {where} this node's"
            hint = "let chrony or systemd-timesyncd keep it: `timedatectl set-ntp true` there"
            yield found("clock", "error", member.name, "clock", message, hint)


def check_versions(subject: Subject) -> Iterator[Finding]:
    """Nodes of other releases than the master's: fine for the time of an upgrade."""
    master = subject.cluster.master_member.name
    versions = {member.name: said.info.version for member, said in subject.heard()}
    for name, version in versions.items():
        if master in versions and version != versions[master]:
            message = f"it runs kvmsec {version}, the master {versions[master]}"
            hint = f"install the same release on {name}"
            yield found("version", "warning", name, "version", message, hint)


def check_copies(subject: Subject) -> Iterator[Finding]:
    """Whether every member's copy of the state is the newest, and was confirmed lately."""
    for member, said in subject.heard():
        if member.uuid != subject.cluster.master:
            yield from _check_copy(subject, member, said.info)


def _check_copy(subject: Subject, member: Member, info: NodeInfo) -> Iterator[Finding]:
    hint = "hand it the state with `kvmsec cluster sync`"
    if info.revision > subject.revision:
        message = f"it has revision {info.revision}, newer than {subject.revision} here"
        newer = "two nodes took themselves for the master: run `kvmsec cluster master-failover "
        newer += "--force` on the one that shall be it"
        yield found("copy-newer", "error", member.name, "state", message, newer)
    elif info.revision < subject.revision:
        message = f"it has revision {info.revision}, older than {subject.revision}"
        yield found("copy-old", "error", member.name, "state", message, hint)
    elif info.confirmed_at is None or info.time - info.confirmed_at > timedelta(
        seconds=subject.copy_valid_s
    ):
        since = "never" if info.confirmed_at is None else f"not since {info.confirmed_at:%F %T}"
        message = f"its copy was {since} confirmed, so it starts nothing under pool"
        yield found("copy-unconfirmed", "error", member.name, "state", message, hint)


def check_certless(subject: Subject) -> Iterator[Finding]:
    """Running without client certificates is a last resort: it is nagged about while it lasts."""
    until = {member.name: said.info.certless_until for member, said in subject.heard()}
    if not any(until.values()):
        return
    for name, end in until.items():
        if end is None:
            message = "it has no common certificate, while others run without client certificates"
            hint = "carry it over: `kvmsec cluster certless enable --bundle FILE`, then `kvmsec "
            hint += "node certless FILE` there"
            yield found("certless-missing", "warning", name, "certificates", message, hint)
        else:
            message = f"it runs without client certificates until {end:%F %T}"
            hint = "end it with `kvmsec cluster certless disable` once RPC works again"
            yield found("certless", "warning", name, "certificates", message, hint)


def _seconds(span: timedelta) -> str:
    return f"{span.total_seconds():.0f}"

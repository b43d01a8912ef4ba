"""Whether all members show and trust the right certificates: pure."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from uuid import UUID

from kvmsec.agent import Finding
from kvmsec.cluster.verify.codes import Severity, found
from kvmsec.cluster.verify.subject import ERROR_DAYS, WARN_DAYS, Subject
from kvmsec.model.cluster import Member
from kvmsec.pki.errors import LIST_MENDED
from kvmsec.rpc.messages import CertificateFacts
from kvmsec.store.freshness import SKEW_S

LIST = "ssconf_master_candidates_certs"


def check_anchors(subject: Subject) -> Iterator[Finding]:
    """server.pem: there, the same on all nodes as on the master, and not about to end."""
    master = subject.cluster.master
    wanted = next((said.anchors for one, said in subject.heard() if one.uuid == master), None)
    for member, said in subject.heard():
        again = subject.admit_again(member)
        if not said.anchors:
            message = "server.pem is missing or can't be read"
            yield found("anchor-missing", "error", member.name, "server.pem", message, again)
            continue
        if wanted and _fingerprints(said.anchors) != _fingerprints(wanted):
            message = "server.pem is another than the master's"
            yield found("anchor-differs", "error", member.name, "server.pem", message, again)
        for anchor in said.anchors:
            hint = "`kvmsec cluster renew-crypto --new-cluster-certificate`"
            yield from _check_end(
                "anchor-expires", subject.now, member, "server.pem", anchor.not_after, hint
            )


def check_own(subject: Subject) -> Iterator[Finding]:
    """client.pem: there, the node's own and nobody else's, and valid for a while yet."""
    owners: dict[str, str] = {}
    for member, said in subject.heard():
        again = f"`kvmsec cluster renew-crypto --node {member.name}`"
        facts = said.certificate
        if facts is None:
            message = "client.pem is missing or can't be read"
            hint = subject.admit_again(member)
            yield found("certificate-missing", "error", member.name, "client.pem", message, hint)
            continue
        if (owner := owners.setdefault(facts.fingerprint, member.name)) != member.name:
            message = f"it is the same as {owner}'s"
            yield found("certificate-shared", "error", member.name, "client.pem", message, again)
        if facts.fingerprint not in member.certificates:
            message = f"the cluster's state does not have {facts.fingerprint[:16]}… for it"
            yield found("certificate-unknown", "error", member.name, "client.pem", message, again)
        yield from _check_names(member, facts, again)
        if (facts.not_before - subject.now).total_seconds() > SKEW_S:
            message = f"it is valid from {facts.not_before:%F %T} only"
            hint = f"set the clocks right, then {again}"
            yield found("certificate-early", "error", member.name, "client.pem", message, hint)
        yield from _check_end(
            "certificate-expires", subject.now, member, "client.pem", facts.not_after, again
        )


def _check_names(member: Member, facts: CertificateFacts, hint: str) -> Iterator[Finding]:
    """The uuid as a URN, and the node's name as a DNS name, which knows no case (RFC 4343)."""
    if not {member.uuid.urn, member.name.lower()} <= {name.lower() for name in facts.names}:
        message = f"it is for {', '.join(facts.names) or 'nobody'}"
        yield found("certificate-name", "error", member.name, "client.pem", message, hint)


def _check_end(
    code: str, now: datetime, member: Member, item: str, end: datetime, hint: str
) -> Iterator[Finding]:
    left_days = (end - now).total_seconds() / 86400
    if left_days > WARN_DAYS:
        return
    message = f"it ends at {end:%F %T}" if left_days > 0 else f"it ended at {end:%F %T}"
    severity: Severity = "error" if left_days <= ERROR_DAYS else "warning"
    yield found(code, severity, member.name, item, message, hint)


def check_renewal(subject: Subject) -> Iterator[Finding]:
    """A renewal that has not come to its end: who is waited for, and where old and new count."""
    said = {member.uuid: said for member, said in subject.heard()}
    hint = "go on with `kvmsec cluster renew-crypto` on the master"
    for member in subject.cluster.nodes:
        anchors = said[member.uuid].anchors if member.uuid in said else None
        is_master = member.uuid == subject.cluster.master
        if member.name in subject.awaited:
            message = "a renewal of certificates waits for it"
        elif len(member.certificates) > 1:
            message = "its old and its new certificate count, until a renewal is at its end"
        elif is_master and len(anchors or ()) > 1:
            message = "server.pem has two certificates, until a renewal is at its end"
        else:
            continue
        yield found("renewal-pending", "warning", member.name, "certificates", message, hint)


def check_lists(subject: Subject) -> Iterator[Finding]:
    """The list of candidates on each node: each candidate with its certificate, nobody else."""
    wanted = subject.cluster.orderers
    names = {member.uuid: member.name for member in subject.cluster.nodes}
    for member, said in subject.heard():
        if not said.candidates:
            message = f"{LIST} is missing, empty or can't be read: nobody may order there"
            hint = f"on {member.name} {LIST_MENDED}"
            yield found("candidates-unreadable", "error", member.name, LIST, message, hint)
            continue
        listed: dict[UUID, set[str]] = {}
        for uuid, fingerprint in said.candidates:
            listed.setdefault(uuid, set()).add(fingerprint)
        for code, message in _differences(listed, wanted, names):
            hint = "`kvmsec cluster sync`"
            yield found(code, "error", member.name, LIST, message, hint)


def _differences(
    listed: Mapping[UUID, set[str]],
    wanted: Mapping[UUID, frozenset[str]],
    names: Mapping[UUID, str],
) -> Iterator[tuple[str, str]]:
    """The code and the words for each way in which a list is not the one that it should be."""
    for uuid, fingerprints in wanted.items():
        if uuid not in listed:
            yield "candidate-unlisted", f"the candidate {names[uuid]} is not on the list"
        elif listed[uuid] != fingerprints:
            message = f"the list has another certificate for the candidate {names[uuid]}"
            yield "candidate-other", message
    for uuid in listed:
        if uuid in wanted:
            continue
        if uuid in names:
            message = f"{names[uuid]}, which is no candidate, is on the list: it may order there"
            yield "plain-listed", message
        else:
            yield "stranger-listed", f"the list has {uuid}, which is no member"


def check_keys(subject: Subject) -> Iterator[Finding]:
    """The cluster's key: on each candidate, so that it may become the master, and nowhere else."""
    for member, said in subject.heard():
        if said.holds_cluster_key and not member.is_candidate:
            message = "it has the cluster's key, and is no candidate"
            hint = (
                f"take it away with `kvmsec node demote {member.name}`, and make copies worthless "
            )
            hint += "with `kvmsec cluster renew-crypto --new-cluster-certificate`"
            yield found("key-on-plain", "error", member.name, "server.key", message, hint)
        if member.is_candidate and not said.holds_cluster_key:
            message = "it is a candidate without the cluster's key, and can sign nothing as master"
            hint = f"`kvmsec node promote {member.name}`"
            yield found("key-missing", "error", member.name, "server.key", message, hint)
    if len(subject.cluster.nodes) > 1 and len(subject.cluster.candidates) == 1:
        master = subject.cluster.master_member.name
        message = "it is the only candidate: if it is lost, nobody may order any more"
        hint = "make a second one with `kvmsec node promote NAME`"
        yield found("candidates-few", "warning", master, "candidates", message, hint)


def _fingerprints(anchors: tuple[CertificateFacts, ...]) -> set[str]:
    return {anchor.fingerprint for anchor in anchors}

"""Whether the pool, the leases, the rules and the confinement hold on every node: pure."""

from collections.abc import Iterator

from kvmsec.agent import Finding
from kvmsec.cluster.verify.codes import found
from kvmsec.cluster.verify.subject import Subject
from kvmsec.errors import BadName
from kvmsec.model.cluster import Member
from kvmsec.model.names import require_name
from kvmsec.model.security import SecurityModel


def check_pool(subject: Subject) -> Iterator[Finding]:
    """The pool's users, on every node."""
    for member, said in subject.heard():
        for problem in said.pool_problems:
            if problem.severity != "ok":
                hint = f"`kvmsec uids provision {subject.cluster.uid_pool}` there"
                hint += _its_words(member, problem.hint)
                yield found(
                    "pool-user", problem.severity, member.name, "uid pool", problem.message, hint
                )


def check_leases(subject: Subject) -> Iterator[Finding]:
    """Leases against processes: each lease has a process, each pool instance a lease."""
    for member, said in subject.heard():
        for lease in said.leases:
            if not lease.is_alive:
                message = f"uid {lease.uid} is leased to {lease.instance}, of which nothing lives"
                hint = "any `kvmsec instance` command there cleans it up; `kvmsec uids list` tells "
                hint += "what is left"
                yield found("lease-dead", "warning", member.name, "uids", message, hint)
        for name in said.running_without_lease:
            message = f"{name} runs under a uid of the pool without a lease of it"
            hint = "stop it with `kvmsec instance stop` there"
            if _may_be_an_instance(name):
                hint = f"stop it: `kvmsec instance stop {name} --node {member.name}`"
            yield found("instance-unleased", "error", member.name, "uids", message, hint)


def check_rules(subject: Subject) -> Iterator[Finding]:
    """The packet rules, by structure and by canary."""
    for member, said in subject.heard():
        for rule in said.rules:
            if rule.severity != "ok":
                hint = "`kvmsec firewall apply` there" + _its_words(member, rule.hint)
                yield found("rules", rule.severity, member.name, rule.item, rule.message, hint)


def check_confinement(subject: Subject) -> Iterator[Finding]:
    """What runs as root, and what a node may do without."""
    cluster = subject.cluster
    if cluster.default_model is SecurityModel.NONE:
        message = "the cluster's security model is none: an instance runs as root unless it says"
        message += " otherwise"
        hint = "set a pool with `kvmsec cluster modify --uid-pool POOL --security-model pool`"
        yield found("model-none", "warning", cluster.master_member.name, "security", message, hint)
    for member, said in subject.heard():
        for name in said.unconfined:
            message = f"{name} runs as root (security model none)"
            hint = f"stop it, and start it under another model on {member.name}"
            yield found("model-none", "warning", member.name, "security", message, hint)
        for piece in said.may_be_missing:
            message = f"its settings let instances start without {piece}"
            hint = "take it out of confinement.may_be_missing in kvmsec.toml there"
            yield found("confinement", "warning", member.name, "confinement", message, hint)


def _its_words(member: Member, hint: str | None) -> str:
    """What a node would have done, as its own words: a hostile one would name any command."""
    return f"; {member.name} says: {hint}" if hint else ""


def _may_be_an_instance(name: str) -> bool:
    """Whether a name that a node gave may stand in a command that a person copies."""
    try:
        require_name("an instance", name)
    except BadName:
        return False
    return True

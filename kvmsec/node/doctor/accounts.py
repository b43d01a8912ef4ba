"""The uid pool, who holds what of it, and the instances of this node."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from kvmsec.agent import InstanceState
from kvmsec.node.doctor.subject import Answer, Subject, error, ok, warning
from kvmsec.node.listing import describe_all
from uidpool import provision
from uidpool.accounts import AccountRules, check_pool
from uidpool.claims import State
from uidpool.snapshot import Snapshot

_SHOWN: Final = 5
_NOT_FREE: Final = (State.LEASED, State.RESTING, State.QUARANTINED)
_FIRST_STEPS: Final = (
    "kvmsec uids provision POOL, then: kvmsec cluster init --name NAME --uid-pool POOL"
)


def check_pool_users(subject: Subject) -> Iterator[Answer]:
    """Every uid of the pool is a user that is nobody else's and can do nothing."""
    cluster, _ = subject.host.store.load()
    if cluster is None:
        yield warning("there is no cluster yet, so no uid pool", _FIRST_STEPS)
        return
    if not cluster.uid_pool:
        hint = "kvmsec uids provision POOL, then: kvmsec cluster modify --uid-pool POOL"
        yield warning(f"{cluster.name} has no uid pool; the model `pool` needs one", hint)
        return
    freed = subject.config.uids.freed_ranges if subject.config else None
    rules = AccountRules(freed) if freed is not None else AccountRules()
    problems = check_pool(cluster.uid_pool, rules)
    for problem in problems:
        yield error(problem.message, problem.hint)
    if not problems:
        yield ok(f"{cluster.uid_pool} ({cluster.uid_pool.size()} uids), every one fit")


def check_reaper(subject: Subject) -> Iterator[Answer]:
    """The user that ends what a pool uid has left."""
    reaper = provision.find_reaper(Snapshot.read())
    if reaper is not None:
        yield ok(f"{reaper.name} has uid {reaper.uid}")
    elif subject.pool:
        hint = f"kvmsec uids provision {subject.pool}"
        yield error(f"there is no user {provision.REAPER} as provisioning makes it", hint)
    else:
        yield warning(f"there is no user {provision.REAPER} yet", "kvmsec uids provision POOL")


def check_claims(subject: Subject) -> Iterator[Answer]:
    """How much of the pool may be drawn, what could not be cleaned, what can't be read."""
    claims, pool = subject.host.claims, subject.pool
    for unreadable in claims.unreadable():
        yield error(unreadable.message, unreadable.hint)
    quarantined = claims.quarantined()
    for one in quarantined[:_SHOWN]:
        yield warning(f"uid {one.uid}: {one.reason}", f"kvmsec uids release {one.uid}")
    if left_out := len(quarantined[_SHOWN:]):
        yield warning(f"{left_out} more uids are quarantined", "kvmsec uids list")
    if not pool:
        yield ok("there is no pool to draw from")
        return
    counts = Counter(one.state for one in claims.states() if one.uid in pool)
    free = pool.size() - counts.total()
    told = ", ".join(
        [f"{free} free", *(f"{counts[state]} {state.value}" for state in _NOT_FREE)],
    )
    if free + counts[State.RESTING] > 0:
        yield ok(told)
    else:
        yield warning(f"none can be drawn: {told}", "kvmsec cluster modify --add-uids POOL")


def check_instances(subject: Subject) -> Iterator[Answer]:
    """Those that are not what somebody asked for."""
    described = describe_all(subject.host)
    for info in described:
        if info.state is InstanceState.UNKNOWN:
            yield warning(f"{info.name}: {info.reason}", f"kvmsec instance info {info.name}")
        elif info.state is InstanceState.CRASHED:
            hint = f"kvmsec instance log {info.name}, then start or stop it"
            yield warning(f"{info.name} crashed: {info.reason}", hint)
        elif info.state is InstanceState.STARTING and info.reason:
            yield warning(f"the start of {info.name} was {info.reason}", "kvmsec instance list")
    running = sum(info.state is InstanceState.RUNNING for info in described)
    yield ok(f"{len(described)} known, {running} running")

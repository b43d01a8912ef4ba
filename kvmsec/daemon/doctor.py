"""`kvmsec doctor` on a member of a cluster: the node's own checks, then what its daemon needs.

The two meet here and nowhere else: the command line asks for both where no daemon answers, and a
daemon whoever asks it.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

from kvmsec.agent import Agent, Finding
from kvmsec.daemon.front_user import UnfitFrontUser, find_front_user
from kvmsec.linux.errors import Fault
from kvmsec.node.doctor import examine
from kvmsec.node.doctor.subject import Answer, Check, Subject, error, ok, warning
from kvmsec.node.host import Host
from kvmsec.pki.certificates import facts_of, load_certificate
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.errors import CANDIDATES_FILE, PeerRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.judgement import SKEW
from kvmsec.pki.pems import split_pems
from uidpool.ranges import EMPTY

_KEY_FILES: Final = ("client.pem", "server.pem", CANDIDATES_FILE, "certless.pem")


async def doctor(node: Agent, host: Host) -> tuple[Finding, ...]:
    """Whether this host is ready; `node` is its own, by no daemon. Reads only."""
    found = await node.doctor()
    return (*found, *await examine(host, CHECKS)) if is_of_a_cluster(host) else found


def is_of_a_cluster(host: Host) -> bool:
    """Whether there is anything for a daemon to serve with, or others that expect it to.

    A member that has lost all its key files is one.
    """
    paths = (host.paths.key_files / name for name in _KEY_FILES)
    if any(path.is_symlink() or path.exists() for path in paths):
        return True
    cluster = Subject.of(host).cluster
    return cluster is not None and len(cluster.nodes) > 1


def check_front_user(subject: Subject) -> Iterator[Answer]:
    """The user that the front and the courier run as; without it no daemon starts."""
    if subject.config is None:
        return  # The check of the configuration has said why.
    name = subject.config.node.front_user
    pool = EMPTY if subject.cluster is None else subject.cluster.guarded_uids
    try:
        found = find_front_user(name, pool)
    except UnfitFrontUser as unfit:
        is_alone = subject.cluster is not None and len(subject.cluster.nodes) == 1
        # A cluster of one node works without a daemon.
        yield (warning if is_alone else error)(unfit.message, unfit.hint)
        return
    yield ok(f"{name} has uid {found.uid}")


def check_key_files(subject: Subject) -> Iterator[Answer]:
    """The files that trust comes from: there, root's alone, whole, and valid today."""
    files = KeyFiles(subject.paths.key_files)
    looks = (_look_at_anchors, _look_at_own, _look_at_list, _look_at_cluster_key)
    problems = [problem for look in looks for problem in _tried(look, files)]
    problems = problems or list(_tried(_look_at_chain, files))
    yield from problems
    if not problems:
        yield ok("there, root's alone, and valid")


def _tried(look: Callable[[KeyFiles], Iterable[Answer]], files: KeyFiles) -> Iterator[Answer]:
    try:
        yield from look(files)
    except Fault as fault:
        yield error(fault.message, fault.hint)


def _look_at_anchors(files: KeyFiles) -> Iterator[Answer]:
    hint = "kvmsec cluster renew-crypto --new-cluster-certificate, on the master"
    for pem in split_pems(files.anchors(), "server.pem"):
        yield from _wrong_times("server.pem", pem, hint)


def _look_at_own(files: KeyFiles) -> Iterator[Answer]:
    hint = "kvmsec cluster renew-crypto --node NAME, on the master"
    yield from _wrong_times("client.pem", files.own().certificate_pem, hint)


def _look_at_chain(files: KeyFiles) -> Iterator[Answer]:
    try:
        anchor_of(load_certificate(files.own().certificate_pem), files.anchors_der())
    except PeerRefused as refused:
        hint = "kvmsec cluster verify, on the master, says which of the two is another than its own"
        yield error(f"client.pem does not go with server.pem: {refused.reason}", hint)


def _look_at_list(files: KeyFiles) -> Iterator[Answer]:
    files.candidates()
    yield from ()


def _look_at_cluster_key(files: KeyFiles) -> Iterator[Answer]:
    if files.holds_cluster_key():
        files.cluster()
    yield from ()


def _wrong_times(name: str, pem: str, hint: str) -> Iterator[Answer]:
    facts, now = facts_of(pem), datetime.now(UTC)
    if now - SKEW > facts.not_after:
        yield error(f"{name} has ended at {facts.not_after:%F %T} UTC", hint)
    elif now + SKEW < facts.not_before:
        message = f"{name} is valid from {facts.not_before:%F %T} UTC only"
        yield error(message, f"set the clock right; if it is: {hint}")


CHECKS: Final = (
    Check("front-user", "front's user", check_front_user),
    Check("key-files", "key files", check_key_files),
)

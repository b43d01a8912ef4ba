"""A cluster in one root, with a real daemon, and nodes of the test's own that call it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from attrs import evolve, frozen

from kvmsec.linux import command
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.paths import Paths
from kvmsec.pki.certificates import (
    anchors_of,
    fingerprint_of,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.contexts import client_context
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc.client import HttpsTransport
from kvmsec.store.file import FileStore
from kvmsec.store.identity import Identity, IdentityFile
from uidpool.ranges import EMPTY

KVMSEC = Path(sys.executable).with_name("kvmsec")
FRONT_USER = "kvmsec-front"
DEADLINE_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def make_front_user() -> None:
    """The one command that an error about it prints."""
    argv = "useradd --system --user-group --no-create-home --home-dir /nonexistent"
    command.run([*argv.split(), "--shell", "/usr/sbin/nologin", FRONT_USER], timeout_s=30)


@frozen
class Ours:
    """A node of the test's: who it is, and what it calls with."""

    member: Member
    pair: Pair


class ClusterOfTwo:
    """`here` (served by a daemon), `other` (a candidate) and `plain`; none but the first exists."""

    def __init__(self, root: Path, kind: KeyKind = KeyKind.ED25519) -> None:
        self.root = root
        self.kind = kind
        self.paths = Paths(root)
        self.paths.make_directories()
        self.port = free_port()
        self.uuid = uuid4()
        self.anchor = make_cluster_pair("site", self.uuid, kind=kind, now=datetime.now(UTC))
        self.here = self.make("here", Role.CANDIDATE)
        self.other = self.make("other", Role.CANDIDATE)
        self.plain = self.make("plain", Role.PLAIN)
        self.files = KeyFiles(self.paths.key_files)
        self.store = FileStore(self.paths.cluster)

    def make(self, name: str, role: Role, *, signed_by: Pair | None = None) -> Ours:
        uuid, now = uuid4(), datetime.now(UTC)
        request = make_request(name, uuid, kind=self.kind)
        signer = signed_by or self.anchor
        certificate = sign_request(
            signer, request.request_pem, node_name=name, node_uuid=uuid, now=now
        )
        member = Member(
            name,
            uuid=uuid,
            address="127.0.0.1",
            port=self.port,
            role=role,
            certificates=(fingerprint_of(certificate),),
        )
        return Ours(member, Pair(certificate, request.key_pem))

    def cluster(self) -> Cluster:
        return Cluster(
            name="site",
            uuid=self.uuid,
            uid_pool=EMPTY,
            draining=EMPTY,
            security_model=None,
            nodes=(self.here.member, self.other.member, self.plain.member),
            master=self.other.member.uuid,
            created_at=datetime.now(UTC),
        )

    def join(self) -> None:
        """Make `here` a member, with the state of a master that is elsewhere."""
        cluster = self.cluster()
        IdentityFile(self.paths.var / "node.json").save(
            Identity(uuid=self.here.member.uuid, cluster_uuid=self.uuid)
        )
        self.store.put_copy(document(cluster), 2, 1, at=datetime.now(UTC))
        self.files.install(self.anchor.certificate_pem, self.here.pair)
        self.files.write_candidates(cluster.orderers)

    def state(self, cluster: Cluster, revision: int) -> m.State:
        return m.State(revision=revision, format=2, document=document(cluster))

    def demoted(self, ours: Ours) -> Cluster:
        nodes = tuple(
            evolve(node, role=Role.PLAIN) if node.uuid == ours.member.uuid else node
            for node in self.cluster().nodes
        )
        return evolve(self.cluster(), nodes=nodes, master=self.here.member.uuid)

    def call(self, work: Callable[[HttpsTransport], Awaitable[Any]], ours: Ours) -> Any:
        """Call the daemon as one of the nodes; the connection is kept for the length of `work`."""
        trust = Trust(
            anchors=anchors_of(self.anchor.certificate_pem),
            members={node.uuid: node.name for node in self.cluster().nodes},
            candidates=self.cluster().orderers,
        )
        context = client_context(ours.pair, self.anchor.certificate_pem)
        to: Mapping[str, Any] = {"name": "here", "uuid": self.here.member.uuid}

        async def whole() -> Any:
            transport = HttpsTransport(
                "127.0.0.1", self.port, to["name"], to["uuid"], lambda: context, lambda: trust
            )
            try:
                async with asyncio.timeout(DEADLINE_S):
                    return await work(transport)
            finally:
                await transport.close()

        return asyncio.run(whole())

    def ask(self, name: str, request: m.Message, ours: Ours | None = None) -> Any:
        return self.call(lambda transport: transport.call(name, request), ours or self.other)


def document(cluster: Cluster) -> Any:
    from kvmsec.model.cluster import document_of

    return document_of(cluster)


class Daemon:
    """A real `kvmsec node serve`, and what it says."""

    def __init__(
        self, root: Path, *words: str, through: Sequence[str] = (), **options: Any
    ) -> None:
        argv = [*through, str(KVMSEC), "--root", str(root), "node", "serve", *words]
        # A file and no pipe with a thread at it: what a test forks must have one thread.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self.process = subprocess.Popen(
            argv, stderr=self._said, stdin=subprocess.DEVNULL, **options
        )

    @property
    def lines(self) -> list[str]:
        """What it has said so far."""
        size = os.fstat(self._said.fileno()).st_size
        return os.pread(self._said.fileno(), size, 0).decode().splitlines()

    def says(self, words: str, *, times: int = 1) -> str:
        """Wait until it has said so that often; returns the line."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            lines = self.lines
            found = [line for line in lines if words in line]
            if len(found) >= times:
                return found[times - 1]
            if time.monotonic() > deadline:
                raise AssertionError(f"{words!r} was not said: {lines}")
            time.sleep(0.005)

    @property
    def front(self) -> int:
        """The pid of its front."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = [int(word) for word in children.split() if _is_front(int(word))]
        return pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it if it still runs, and forget what it said."""
        self.end()
        self._said.close()


def _is_front(pid: int) -> bool:
    try:
        return b"kvmsec-front" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def ends(pid: int) -> bool:
    """Whether a process is gone before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_there(pid)

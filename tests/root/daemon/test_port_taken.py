"""A local user who has bound the node's port first: the service is refused, and nothing is told."""

import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from kvmsec.linux import children
from kvmsec.pki.certificates import make_cluster_pair, make_request, sign_request
from kvmsec.pki.contexts import server_context
from kvmsec.pki.pems import Pair
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root

SOMEBODY = 247001


def context_of_a_stranger() -> ssl.SSLContext:
    """A server's that calls itself node2, by a cluster of its own, and asks who calls it."""
    site, uuid, now = uuid4(), uuid4(), datetime.now(UTC)
    anchor = make_cluster_pair("site", site, now=now)
    request = make_request("node2", uuid)
    signed = sign_request(anchor, request.request_pem, node_name="node2", node_uuid=uuid, now=now)
    return server_context(Pair(signed, request.key_pem), anchor.certificate_pem)


def serve_as_somebody(port: int, context: ssl.SSLContext, told: int) -> None:
    """Write a line for each caller: what it has said once it has seen our certificate."""
    os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
    os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
    with socket.create_server(("127.0.0.1", port)) as listener:
        os.write(told, b"listening\n")
        while True:
            connection, _ = listener.accept()
            connection.settimeout(20)
            with connection:
                os.write(told, f"{shake_hands(connection, context)}\n".encode())


def shake_hands(connection: socket.socket, context: ssl.SSLContext) -> str:
    """`trusted`, or how many bytes came after our certificate was sent."""
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, sent, server_side=True)
    after = 0
    with contextlib.suppress(OSError):  # ssl.SSLError among them
        while True:
            try:
                tls.do_handshake()
                return "trusted"
            except ssl.SSLWantReadError:
                has_shown = sent.pending > 0 or after > 0
                connection.sendall(sent.read())
            if not (data := connection.recv(1 << 16)):
                break
            after += len(data) if has_shown else 0
            received.write(data)
    return str(after)


@contextmanager
def taken(port: int) -> Iterator[Callable[[], list[str]]]:
    """Somebody has the port; gives what callers have said so far."""
    context = context_of_a_stranger()
    reader, writer = os.pipe()
    pid = children.fork()
    if pid == 0:
        try:
            serve_as_somebody(port, context, writer)
        finally:
            os._exit(1)
    os.close(writer)
    lines = b""

    def heard() -> list[str]:
        nonlocal lines
        lines += os.read(reader, 1 << 16)
        return lines.decode().splitlines()

    try:
        assert heard() == ["listening"]
        yield heard
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)


def require_silence(lines: list[str]) -> None:
    """An alert has 24 bytes, a certificate hundreds."""
    assert lines[1:]
    assert all(int(line) < 64 for line in lines[1:]), lines


def test_who_has_the_port_of_a_member_hears_nothing(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    assert other.daemon is not None
    other.daemon.end()

    with taken(other.port) as heard:
        assert master.codes() == {("node2", "node-refused")}
        require_silence(heard())

        other.serve()
        assert other.daemon.process.wait(20) == 1
        assert [line for line in other.daemon.lines if "Address already in use" in line]
        assert [line for line in other.daemon.lines if "hint: `ss -tlnp" in line]
        other.daemon.close()

    other.serve()
    other.daemon.says("serving other nodes")
    master.do("cluster", "sync")
    assert master.codes() == set()


def test_who_has_the_port_of_an_invited_node_hears_nothing(
    master: Node, nodes: Callable[[], Node]
) -> None:
    node = nodes()
    master.do("node", "invite", "node2")

    with taken(node.port) as heard:
        refused = master.run("node", "add", f"127.0.0.1:{node.port}")
        assert refused.returncode == 1
        assert "is not reached with this token" in refused.stderr
        require_silence(heard())
    assert len(master.state()["nodes"]) == 1


def test_a_port_that_is_listened_on_is_nobody_elses(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    """Neither of an address of its own nor beside it."""
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        pid = children.fork()
        if pid == 0:
            status = 9
            try:
                os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, option, 1)
                    one.bind(("127.0.0.1", master.port))
                    one.listen()
                status = 0
            except OSError:
                status = 1
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

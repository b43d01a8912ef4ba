"""Handshakes between us and the system's `openssl`."""

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from kvmsec.pki import certificates, contexts
from kvmsec.pki.certificates import Pair, der_of
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair
from kvmsec.pki.keys import KeyKind
from tests.contract.pki.openssl_program import (
    TIMEOUT_S,
    UUID_B,
    Openssl,
    call_with_openssl,
    now,
    our_cluster,
    our_node,
    our_server,
)


@contextlib.contextmanager
def _openssl_server(openssl: Openssl, own: Pair, anchors: str, *more: str) -> Iterator[int]:
    openssl.write("s_anchors.pem", anchors)
    openssl.write("s_own.pem", own.pem)
    argv = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-CAfile", "s_anchors.pem"]
    argv += ["-cert", "s_own.pem", "-key", "s_own.pem", "-Verify", "2", "-verify_return_error"]
    child = subprocess.Popen(
        [*argv, "-rev", *more],
        cwd=openssl.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert child.stdout is not None
        said = []
        for line in child.stdout:
            said.append(line)
            if line.startswith("ACCEPT"):
                break
        else:
            raise AssertionError("".join(said))
        # With a port of 0 it says which one it got; of a unix socket it says so too early.
        yield int(line.rpartition(":")[2])
    finally:
        child.kill()
        child.wait()


def _call(own: Pair, anchors: str, port: int) -> tuple[bytes, bytes | None]:
    """Call openssl's server, which sends a line back in reverse."""
    context = contexts.client_context(own, anchors)
    with (
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        connection.sendall(b"abc\n")
        return connection.recv(100), connection.getpeercert(binary_form=True)


@pytest.mark.parametrize("kind", KeyKind)
def test_openssl_calls_us_and_each_sees_the_other(
    kind: KeyKind, openssl: Openssl, tmp_path: Path
) -> None:
    cluster = our_cluster(kind)
    alpha, beta = our_node(cluster, kind=kind), our_node(cluster, "beta", UUID_B, kind)
    with our_server(alpha, cluster.certificate_pem, tmp_path) as server:
        said = call_with_openssl(openssl, beta, cluster.certificate_pem, server, "-msg")
    assert "TLSv1.3" in said
    assert "Verify return code: 0 (ok)" in said
    assert "CertificateRequest" in said
    assert "NewSessionTicket" not in said
    assert "Compression: NONE" in said
    assert "No ALPN negotiated" in said


@pytest.mark.parametrize("kind", KeyKind)
def test_we_call_openssl_and_each_sees_the_other(kind: KeyKind, openssl: Openssl) -> None:
    cluster = our_cluster(kind)
    alpha, beta = our_node(cluster, kind=kind), our_node(cluster, "beta", UUID_B, kind)
    with _openssl_server(openssl, alpha, cluster.certificate_pem) as port:
        answer, shown = _call(beta, cluster.certificate_pem, port)
    assert answer == b"cba\n"
    assert shown == der_of(alpha.certificate_pem)


def test_a_join_and_the_last_resort_meet_openssl_as_well(openssl: Openssl, tmp_path: Path) -> None:
    secret = b"0123456789abcdef"
    common = certificates.make_certless_pair("prod", now=now(), lifetime=timedelta(hours=1))
    cases = [
        (make_joining_pair(secret), make_joining_pair(secret), join_anchor(secret)),
        (common, common, our_cluster().certificate_pem + common.certificate_pem),
    ]
    for number, (ours, theirs, anchors) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        with our_server(ours, anchors, directory) as server:
            call_with_openssl(openssl, theirs, anchors, server)
        with _openssl_server(Openssl(directory), theirs, anchors) as port:
            assert _call(ours, anchors, port)[0] == b"cba\n"


def _none(cluster: Pair) -> Pair | None:
    return None


def _foreign(cluster: Pair) -> Pair | None:
    return our_node(our_cluster(number=2))


@pytest.mark.parametrize(
    ("stranger", "options"),
    [(_none, ()), (_foreign, ()), (our_node, ("-tls1_2",))],
    ids=["no certificate", "foreign", "TLS 1.2"],
)
def test_openssl_gets_nothing_from_us_as_a_stranger(
    stranger: Callable[[Pair], Pair | None],
    options: tuple[str, ...],
    openssl: Openssl,
    tmp_path: Path,
) -> None:
    cluster = our_cluster()
    with our_server(our_node(cluster), cluster.certificate_pem, tmp_path) as server:
        own = stranger(cluster)
        with pytest.raises(ssl.SSLError):
            call_with_openssl(openssl, own, cluster.certificate_pem, server, *options)


@pytest.mark.parametrize("options", [(), ("-tls1_2",)], ids=["foreign", "TLS 1.2"])
def test_we_give_nothing_to_openssl_as_a_stranger(
    options: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = our_cluster()
    serving = our_node(cluster) if options else our_node(our_cluster(number=2))
    with (
        _openssl_server(openssl, serving, cluster.certificate_pem, *options) as port,
        pytest.raises(ssl.SSLError),
    ):
        _call(our_node(cluster), cluster.certificate_pem, port)

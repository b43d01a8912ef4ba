"""The system's `openssl`, and pairs of our making that are held against it."""

import contextlib
import functools
import socket
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from kvmsec.pki import certificates, contexts
from kvmsec.pki.certificates import Pair, anchors_of, der_of, fingerprint_of
from kvmsec.pki.judgement import Trust
from kvmsec.pki.keys import KeyKind

UUID_A = UUID("a0000000-0000-4000-8000-000000000000")
UUID_B = UUID("b0000000-0000-4000-8000-000000000000")
CLUSTER = UUID("c0000000-0000-4000-8000-000000000000")
TIMEOUT_S = 30.0

# How openssl makes a key of each kind; the traditional formats where there are some.
KEYS: list[tuple[str, ...]] = [
    ("genpkey", "-algorithm", "ed25519"),
    ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
    ("ecparam", "-name", "prime256v1", "-genkey"),
    ("genrsa", "3072"),
    ("genrsa", "-traditional", "3072"),
]
KEY_NAMES = ["ed25519", "p256", "p256-traditional", "rsa3072", "rsa3072-traditional"]


def now() -> datetime:
    """At that moment: openssl goes by the machine's clock."""
    return datetime.now(UTC)


@functools.cache
def _made_key(owner: str, key: tuple[str, ...]) -> str:
    """A key of openssl's making; an RSA key takes a second, so each owner keeps its own."""
    done = subprocess.run(
        ["openssl", *key], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


class Openssl:
    """The system's openssl in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: str, fine: bool = True) -> str:
        done = subprocess.run(
            ["openssl", *arguments],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert (done.returncode == 0) is fine, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, name: str, text: str) -> str:
        (self.directory / name).write_text(text)
        return name

    def read(self, name: str) -> str:
        return (self.directory / name).read_text()

    def make_cluster(self, key: tuple[str, ...], *, mask: str = "utf8only") -> Pair:
        """A self-signed authority in openssl's encoding."""
        self.write("key", _made_key("cluster", key))
        self.write(
            "cluster.cnf",
            f"[req]\nstring_mask={mask}\nprompt=no\ndistinguished_name=dn\nx509_extensions=ca\n"
            "[dn]\nCN=Production cluster\nO=Example\n"
            "[ca]\nbasicConstraints=critical,CA:true,pathlen:0\nkeyUsage=critical,keyCertSign\n"
            "subjectKeyIdentifier=hash\n",
        )
        made = ("-key", "key", "-config", "cluster.cnf", "-days", "30", "-out", "cluster.pem")
        self("req", "-x509", *made)
        return Pair(self.read("cluster.pem"), self.read("key"))

    def make_request(self, key: tuple[str, ...]) -> tuple[str, str]:
        """A key and a request of openssl's."""
        self.write("node.key", _made_key("node", key))
        self("req", "-new", "-key", "node.key", "-subj", "/CN=whatever", "-out", "node.csr")
        return self.read("node.key"), self.read("node.csr")

    def make_node(self, cluster: Pair, name: str, uuid: UUID, key: tuple[str, ...]) -> Pair:
        """A node's certificate that openssl has signed."""
        key_pem, _ = self.make_request(key)
        self.write(
            "node.cnf",
            "basicConstraints=CA:false\nextendedKeyUsage=serverAuth,clientAuth\n"
            f"subjectAltName=DNS:{name},URI:{uuid.urn}\n",
        )
        self.write("ca.pem", cluster.certificate_pem)
        self.write("ca.key", cluster.key_pem)
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "20")
        self("x509", "-req", "-in", "node.csr", *signer, "-extfile", "node.cnf", "-out", "node.pem")
        return Pair(self.read("node.pem"), key_pem)


@functools.cache
def our_cluster(kind: KeyKind = KeyKind.ED25519, number: int = 1) -> Pair:
    return certificates.make_cluster_pair("prod", CLUSTER, kind=kind, now=now(), lifetime_days=30)


@functools.cache
def our_node(
    cluster: Pair, name: str = "alpha", uuid: UUID = UUID_A, kind: KeyKind = KeyKind.ED25519
) -> Pair:
    request = certificates.make_request(name, uuid, kind=kind)
    certificate = certificates.sign_request(
        cluster, request.request_pem, node_name=name, node_uuid=uuid, now=now(), lifetime_days=20
    )
    return Pair(certificate, request.key_pem)


def trust_in(cluster: Pair, pair: Pair) -> Trust:
    return Trust(
        anchors=anchors_of(cluster.certificate_pem),
        members={UUID_A: "alpha"},
        candidates={UUID_A: frozenset({fingerprint_of(pair.certificate_pem)})},
    )


@contextlib.contextmanager
def our_server(own: Pair, anchors: str, directory: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = directory / "server.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        context = contexts.server_context(own, anchors)
        yield context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False), path


def call_with_openssl(
    openssl: Openssl,
    own: Pair | None,
    anchors: str,
    server: tuple[socket.socket, Path],
    *more: str,
) -> str:
    """Let `openssl s_client` call our server and have a line; returns all that it said."""
    listener, path = server
    openssl.write("s_anchors.pem", anchors)
    argv = ["openssl", "s_client", "-unix", str(path), "-CAfile", "s_anchors.pem"]
    if own is not None:
        openssl.write("s_own.pem", own.pem)
        argv += ["-cert", "s_own.pem", "-key", "s_own.pem"]
    argv += ["-verify_return_error", "-ign_eof", *more]
    child = subprocess.Popen(
        argv,
        cwd=openssl.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        connection, _ = listener.accept()
        with connection:
            assert isinstance(connection, ssl.SSLSocket)
            connection.settimeout(TIMEOUT_S)
            connection.do_handshake()
            if own is not None:
                wanted = der_of(own.certificate_pem)
                assert connection.getpeercert(binary_form=True) == wanted
            connection.sendall(b"welcome by name\n")
            connection.unwrap()
        said, _ = child.communicate(timeout=TIMEOUT_S)
    finally:
        child.kill()
        child.wait()
    assert "welcome by name" in said
    return said

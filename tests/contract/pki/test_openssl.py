"""Our certificates and handshakes against the system's `openssl`, and its certificates as ours."""

import contextlib
import functools
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from kvmsec.pki import certificates, contexts
from kvmsec.pki.certificates import Pair, anchors_of, der_of, facts_of, fingerprint_of
from kvmsec.pki.errors import BadPem, PkiError
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair
from kvmsec.pki.judgement import Trust, judge_orderer
from kvmsec.pki.keys import KeyKind

NOW = datetime.now(UTC)  # openssl goes by the machine's clock.
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


@pytest.fixture
def openssl(tmp_path: Path) -> Openssl:
    return Openssl(tmp_path)


@functools.cache
def _cluster(kind: KeyKind = KeyKind.ED25519, number: int = 1) -> Pair:
    return certificates.make_cluster_pair("prod", CLUSTER, kind=kind, now=NOW, lifetime_days=30)


@functools.cache
def _node(
    cluster: Pair, name: str = "alpha", uuid: UUID = UUID_A, kind: KeyKind = KeyKind.ED25519
) -> Pair:
    request = certificates.make_request(name, uuid, kind=kind)
    certificate = certificates.sign_request(
        cluster, request.request_pem, node_name=name, node_uuid=uuid, now=NOW, lifetime_days=20
    )
    return Pair(certificate, request.key_pem)


def _trust(cluster: Pair, pair: Pair) -> Trust:
    return Trust(
        anchors=anchors_of(cluster.certificate_pem),
        members={UUID_A: "alpha"},
        candidates={UUID_A: frozenset({fingerprint_of(pair.certificate_pem)})},
    )


# What we make, read by openssl ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KeyKind)
@pytest.mark.parametrize("cluster_kind", KeyKind)
def test_openssl_verifies_our_chain_by_its_strictest_rules(
    kind: KeyKind, cluster_kind: KeyKind, openssl: Openssl
) -> None:
    cluster = _cluster(cluster_kind)
    openssl.write("server.pem", cluster.certificate_pem)
    openssl.write("node.pem", _node(cluster, kind=kind).certificate_pem)
    for purpose in ("sslserver", "sslclient"):
        rules = ("-x509_strict", "-check_ss_sig", "-purpose", purpose)
        said = openssl("verify", *rules, "-CAfile", "server.pem", "node.pem")
        assert "node.pem: OK" in said


@pytest.mark.parametrize("kind", KeyKind)
def test_openssl_reads_our_keys_requests_and_extensions(kind: KeyKind, openssl: Openssl) -> None:
    request = certificates.make_request("alpha", UUID_A, kind=kind)
    openssl.write("key", request.key_pem)
    openssl.write("csr", request.request_pem)
    openssl.write("node.pem", _node(_cluster(), kind=kind).certificate_pem)

    assert "valid" in openssl("pkey", "-in", "key", "-check", "-noout")
    assert "OK" in openssl("req", "-in", "csr", "-verify", "-noout")
    text = openssl("x509", "-in", "node.pem", "-noout", "-text")
    for words in (
        f"DNS:alpha, URI:urn:uuid:{UUID_A}",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "CA:FALSE",
        "Version: 3",
    ):
        assert words in text


def test_openssl_agrees_on_the_fingerprint(openssl: Openssl) -> None:
    pem = _cluster().certificate_pem
    openssl.write("server.pem", pem)
    said = openssl("x509", "-in", "server.pem", "-noout", "-fingerprint", "-sha256")
    assert said.strip().partition("=")[2].replace(":", "").lower() == fingerprint_of(pem)


# What openssl makes, taken by us -------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS, ids=KEY_NAMES)
@pytest.mark.parametrize("cluster_key", KEYS, ids=KEY_NAMES)
def test_a_cluster_and_a_node_of_openssls_making_are_taken(
    key: tuple[str, ...], cluster_key: tuple[str, ...], openssl: Openssl, tmp_path: Path
) -> None:
    cluster = openssl.make_cluster(cluster_key)
    pair = openssl.make_node(cluster, "alpha", UUID_A, key)

    assert judge_orderer(der_of(pair.certificate_pem), _trust(cluster, pair), NOW).may_order
    directory = tmp_path / "var"
    directory.mkdir(mode=0o700)
    files = KeyFiles(directory)
    files.install(cluster.certificate_pem, Pair.parse(pair.pem))
    files.put("server.key", cluster.key_pem)
    assert fingerprint_of(files.own().certificate_pem) == fingerprint_of(pair.certificate_pem)
    assert files.cluster().certificate_pem == cluster.certificate_pem
    with _our_server(files.own(), files.anchors(), tmp_path) as listener:
        _call_with_openssl(openssl, pair, cluster.certificate_pem, listener)


@pytest.mark.parametrize("mask", ["utf8only", "nombstr", "pkix", "default", "MASK:0x2"])
@pytest.mark.parametrize("key", [KEYS[0], KEYS[2], KEYS[4]], ids=lambda one: " ".join(one))
def test_each_encoding_of_a_clusters_name_signs_nodes_that_openssl_verifies(
    mask: str, key: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = openssl.make_cluster(key, mask=mask)
    pair = _node(cluster)
    openssl.write("node.pem", pair.certificate_pem)

    assert "OK" in openssl("verify", "-x509_strict", "-CAfile", "cluster.pem", "node.pem")
    assert judge_orderer(der_of(pair.certificate_pem), _trust(cluster, pair), NOW).may_order


@pytest.mark.parametrize("key", KEYS, ids=KEY_NAMES)
def test_a_request_of_openssls_making_is_signed(key: tuple[str, ...], openssl: Openssl) -> None:
    cluster = _cluster()
    key_pem, request = openssl.make_request(key)
    certificate = certificates.sign_request(
        cluster, request, node_name="alpha", node_uuid=UUID_A, now=NOW
    )
    pair = certificates.require_whole(Pair(certificate, key_pem))
    assert judge_orderer(der_of(certificate), _trust(cluster, pair), NOW).may_order
    assert facts_of(certificate).subject == "CN=alpha"


def test_text_that_openssl_puts_around_a_certificate_is_left_out(openssl: Openssl) -> None:
    pem = _cluster().certificate_pem
    openssl.write("server.pem", pem)
    text = openssl("x509", "-in", "server.pem", "-text")
    assert text != pem
    assert certificates.split_pems(text) == (pem,)
    with pytest.raises(BadPem):
        anchors_of(openssl("x509", "-in", "server.pem", "-trustout"))


@pytest.mark.parametrize(
    "key",
    [
        ("genrsa", "2048"),
        ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
        ("genpkey", "-algorithm", "ed448"),
    ],
    ids=lambda one: one[-1],
)
def test_a_weak_or_foreign_key_of_openssls_making_is_refused(
    key: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = _cluster()
    _, request = openssl.make_request(key)
    with pytest.raises(PkiError):
        certificates.sign_request(cluster, request, node_name="a", node_uuid=UUID_A, now=NOW)
    pair = openssl.make_node(cluster, "alpha", UUID_A, key)
    with pytest.raises(PkiError):
        judge_orderer(der_of(pair.certificate_pem), _trust(cluster, pair), NOW)


def test_a_certificate_that_is_signed_with_sha1_is_refused(openssl: Openssl) -> None:
    cluster = _cluster(KeyKind.RSA3072)
    openssl.make_node(cluster, "alpha", UUID_A, KEYS[0])
    signer = ("-sha1", "-CA", "ca.pem", "-CAkey", "ca.key", "-extfile", "node.cnf")
    openssl("x509", "-req", "-in", "node.csr", *signer, "-out", "node.pem")
    pair = Pair(openssl.read("node.pem"), openssl.read("node.key"))
    with pytest.raises(PkiError, match="sha1"):
        judge_orderer(der_of(pair.certificate_pem), _trust(cluster, pair), NOW)


# Handshakes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _our_server(own: Pair, anchors: str, directory: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = directory / "server.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        context = contexts.server_context(own, anchors)
        yield context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False), path


def _call_with_openssl(
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
    cluster = _cluster(kind)
    alpha, beta = _node(cluster, kind=kind), _node(cluster, "beta", UUID_B, kind)
    with _our_server(alpha, cluster.certificate_pem, tmp_path) as server:
        said = _call_with_openssl(openssl, beta, cluster.certificate_pem, server, "-msg")
    assert "TLSv1.3" in said
    assert "Verify return code: 0 (ok)" in said
    assert "CertificateRequest" in said
    assert "NewSessionTicket" not in said
    assert "Compression: NONE" in said
    assert "No ALPN negotiated" in said


@pytest.mark.parametrize("kind", KeyKind)
def test_we_call_openssl_and_each_sees_the_other(kind: KeyKind, openssl: Openssl) -> None:
    cluster = _cluster(kind)
    alpha, beta = _node(cluster, kind=kind), _node(cluster, "beta", UUID_B, kind)
    with _openssl_server(openssl, alpha, cluster.certificate_pem) as port:
        answer, shown = _call(beta, cluster.certificate_pem, port)
    assert answer == b"cba\n"
    assert shown == der_of(alpha.certificate_pem)


def test_a_join_and_the_last_resort_meet_openssl_as_well(openssl: Openssl, tmp_path: Path) -> None:
    secret = b"0123456789abcdef"
    common = certificates.make_certless_pair("prod", now=NOW, lifetime=timedelta(hours=1))
    cases = [
        (make_joining_pair(secret), make_joining_pair(secret), join_anchor(secret)),
        (common, common, _cluster().certificate_pem + common.certificate_pem),
    ]
    for number, (ours, theirs, anchors) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        with _our_server(ours, anchors, directory) as server:
            _call_with_openssl(openssl, theirs, anchors, server)
        with _openssl_server(Openssl(directory), theirs, anchors) as port:
            assert _call(ours, anchors, port)[0] == b"cba\n"


def _none(cluster: Pair) -> Pair | None:
    return None


def _foreign(cluster: Pair) -> Pair | None:
    return _node(_cluster(number=2))


@pytest.mark.parametrize(
    ("stranger", "options"),
    [(_none, ()), (_foreign, ()), (_node, ("-tls1_2",))],
    ids=["no certificate", "foreign", "TLS 1.2"],
)
def test_openssl_gets_nothing_from_us_as_a_stranger(
    stranger: Callable[[Pair], Pair | None],
    options: tuple[str, ...],
    openssl: Openssl,
    tmp_path: Path,
) -> None:
    cluster = _cluster()
    with _our_server(_node(cluster), cluster.certificate_pem, tmp_path) as server:
        own = stranger(cluster)
        with pytest.raises(ssl.SSLError):
            _call_with_openssl(openssl, own, cluster.certificate_pem, server, *options)


@pytest.mark.parametrize("options", [(), ("-tls1_2",)], ids=["foreign", "TLS 1.2"])
def test_we_give_nothing_to_openssl_as_a_stranger(
    options: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = _cluster()
    serving = _node(cluster) if options else _node(_cluster(number=2))
    with (
        _openssl_server(openssl, serving, cluster.certificate_pem, *options) as port,
        pytest.raises(ssl.SSLError),
    ):
        _call(_node(cluster), cluster.certificate_pem, port)

"""What the tests of the key files do and ask again and again; for the node alpha."""

from collections.abc import Callable
from datetime import timedelta

from kvmsec.pki.certificates import (
    Pair,
    make_certless_pair,
    require_whole,
    sign_request,
)
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.contexts import client_context, server_context
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.keys import KeyKind
from tests.unit.kvmsec.pki.authorities import NOW, UUIDS, load_certificate

ALPHA = UUIDS["alpha"]


def prepare(files: KeyFiles, anchors: str, kind: KeyKind = KeyKind.ED25519) -> str:
    request = files.prepare(anchors, node_name="alpha", node_uuid=ALPHA, kind=kind)
    assert request is not None
    return request


def sign(cluster: Pair, request: str) -> str:
    return sign_request(cluster, request, node_name="alpha", node_uuid=ALPHA, now=NOW)


def content_of(files: KeyFiles) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(files.directory.iterdir())}


def is_renewing(files: KeyFiles) -> bool:
    """Whether a renewal was begun there, and neither finished nor rolled back."""
    kept = ("client.pem.next", "client.pem.previous", "server.pem.previous")
    return any((files.directory / name).exists() for name in kept)


def require_usable(files: KeyFiles) -> None:
    """What holds at any moment: the pair is whole, and this node's own anchors have signed it."""
    own = require_whole(files.own())
    anchor_of(load_certificate(own.certificate_pem), files.anchors_der())
    server_context(own, files.anchors())
    client_context(own, files.anchors())


def common_pair() -> Pair:
    return make_certless_pair("prod", now=NOW, lifetime=timedelta(hours=2))


READERS: list[tuple[str, Callable[[KeyFiles], object]]] = [
    ("server.pem", KeyFiles.anchors),
    ("client.pem", KeyFiles.own),
    ("server.key", KeyFiles.cluster),
    ("certless.pem", lambda files: files.certless(NOW)),
    ("ssconf_master_candidates_certs", KeyFiles.candidates),
]

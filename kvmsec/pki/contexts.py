"""TLS contexts: 1.3 only, a certificate on both sides, nothing that outlives a connection.

Names are not OpenSSL's to check: `judgement` does, with the uuid. Make a context before the process
is confined: it reads the key through /proc/self/fd.
"""

import os
import ssl
from collections.abc import Mapping

from kvmsec.pki.certificates import require_whole
from kvmsec.pki.errors import BadPem
from kvmsec.pki.pems import Pair


def server_context(
    own: Pair, anchors_pem: str, by_name: Mapping[str, Pair] | None = None
) -> ssl.SSLContext:
    """What a node serves with; `by_name` has what it shows to who asks for a name. Raises BadPem.

    `anchors_pem` has the cluster's certificate, both of them during a renewal, and the common
    certificate of the last resort while it is valid.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, own, anchors_pem)
    # A ticket would bring a session back without its certificate being shown again.
    context.num_tickets = 0
    if by_name:
        others = {name: server_context(pair, anchors_pem) for name, pair in by_name.items()}

        def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            """Other names are no error: a caller's trust is in the certificate, not in them."""
            if name in others:
                tls.context = others[name]

        context.sni_callback = choose
    return context


def client_context(own: Pair, anchors_pem: str) -> ssl.SSLContext:
    """What a node calls with. Raises BadPem."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, own, anchors_pem)


def _context(protocol: ssl._SSLMethod, own: Pair, anchors_pem: str) -> ssl.SSLContext:
    require_whole(own, "the pair to serve and call with")
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    try:
        context.load_verify_locations(cadata=anchors_pem)
        _load_pair(context, own)
    except (ssl.SSLError, ValueError) as error:
        raise BadPem("the pair to serve and call with", f"TLS refuses it ({error})") from None
    return context


def _load_pair(context: ssl.SSLContext, own: Pair) -> None:
    """ssl takes paths only: a file without a name, which is gone with its descriptor."""
    descriptor = os.memfd_create("kvmsec-pair", os.MFD_CLOEXEC)
    try:
        left = memoryview(own.pem.encode())
        while left:
            left = left[os.write(descriptor, left) :]
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)

"""The TLS contexts of both sides of a join: who knows the secret gets through the handshake."""

import ssl

from kvmsec.pki.contexts import client_context, server_context
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair


def joining_server_context(secret: bytes) -> ssl.SSLContext:
    """What a node serves with that belongs to no cluster yet."""
    return server_context(make_joining_pair(secret), join_anchor(secret))


def joining_client_context(secret: bytes) -> ssl.SSLContext:
    """What the master calls such a node with."""
    return client_context(make_joining_pair(secret), join_anchor(secret))

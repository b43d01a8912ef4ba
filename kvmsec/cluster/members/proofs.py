"""What the proofs of a join vouch for: pure."""

import msgspec

from kvmsec.rpc.messages import AdmitRequest, JoinRequest


def said_in_hello(request: JoinRequest) -> bytes:
    """Who the node is to be."""
    return msgspec.json.encode((request.node_name, request.node_uuid))


def said_in_answer(signing_request: str) -> bytes:
    return signing_request.encode()


def said_in_admission(request: AdmitRequest) -> bytes:
    """All that makes a member of the node."""
    said = (request.anchors, request.certificate, request.state)
    return msgspec.json.encode(said, order="deterministic")

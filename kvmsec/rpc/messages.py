"""What nodes say to each other: one request and one response a call, every field typed.

Unknown fields are refused, sizes are bounded. A field that joins later has a default and says in
which version of the protocol it came (`Meta(extra={"since": 2})`); it is not sent to a node that
speaks an earlier one.
"""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Words = Annotated[str, msgspec.Meta(max_length=1 << 16)]
Uids = Annotated[str, msgspec.Meta(max_length=1 << 16)]
"""Ranges as people write them (`uidpool.ranges`)."""
Pem = Annotated[str, msgspec.Meta(max_length=1 << 16)]
Fingerprint = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Timeout = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Uid = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""JSON's own have no bound, and a node that lies may send four thousand digits."""
Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The root of all messages."""


class Nothing(Message, frozen=True, kw_only=True):
    """A request without values, or an answer that says "done"."""


# A node ----------------------------------------------------------------------------------------


class NodeInfo(Message, frozen=True, kw_only=True):
    """Who a node is, and how far its copy of the cluster's state is."""

    name: Name
    uuid: UUID
    cluster_uuid: UUID | None
    version: Name
    protocols: tuple[Number, Number]
    time: Time
    revision: Number
    confirmed_at: Time | None
    certless_until: Time | None = None


class Finding(Message, frozen=True, kw_only=True):
    """`kvmsec.agent.Finding`."""

    code: Name
    severity: Literal["ok", "warning", "error"]
    item: Words
    message: Words
    hint: Words | None = None
    node: Name | None = None


class Findings(Message, frozen=True, kw_only=True):
    findings: tuple[Finding, ...]


class CertificateFacts(Message, frozen=True, kw_only=True):
    """What a certificate says, for those who verify a cluster."""

    fingerprint: Fingerprint
    subject: Words
    names: tuple[Words, ...]
    not_before: Time
    not_after: Time


class LeaseFacts(Message, frozen=True, kw_only=True):
    """A uid that is leased, and whether anything lives that it is leased to."""

    uid: Uid
    instance: Words
    is_alive: bool


class Examination(Message, frozen=True, kw_only=True):
    """What `cluster verify` wants to know of a node; `None` for what could not be read.

    `unreadable` says of each such thing why.
    """

    info: NodeInfo
    anchors: tuple[CertificateFacts, ...] | None
    certificate: CertificateFacts | None
    holds_cluster_key: bool
    candidates: tuple[tuple[UUID, Fingerprint], ...] | None
    pool_problems: tuple[Finding, ...]
    leases: tuple[LeaseFacts, ...]
    running_without_lease: tuple[Words, ...]
    rules: tuple[Finding, ...]
    unconfined: tuple[Words, ...]
    """The instances that run under `none`."""
    may_be_missing: tuple[Words, ...]
    unreadable: tuple[Words, ...] = ()


# Uids and rules --------------------------------------------------------------------------------


class PoolRequest(Message, frozen=True, kw_only=True):
    uids: Uids


class Problem(Message, frozen=True, kw_only=True):
    message: Words
    hint: Words | None = None


class Problems(Message, frozen=True, kw_only=True):
    problems: tuple[Problem, ...]


class Provisioned(Message, frozen=True, kw_only=True):
    """What was done to the users of a pool."""

    made: Uids
    kept: Uids


class Held(Message, frozen=True, kw_only=True):
    """The uids that are held, by whom or why; and the instances that run, start or stop."""

    holders: dict[Uid, Words]
    instances: tuple[Words, ...]


class UidState(Message, frozen=True, kw_only=True):
    """`kvmsec.agent.UidState`."""

    uid: Uid
    user: Words | None
    state: Literal["free", "leased", "resting", "draining", "quarantined"]
    instance: Words | None = None
    reason: Words | None = None
    root: Words | None = None


class UidStatesRequest(Message, frozen=True, kw_only=True):
    with_free: bool = False


class UidStates(Message, frozen=True, kw_only=True):
    states: tuple[UidState, ...]


class UidRequest(Message, frozen=True, kw_only=True):
    uid: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Forced(Message, frozen=True, kw_only=True):
    force: bool = False


class Shown(Message, frozen=True, kw_only=True):
    """Plain values, as JSON has them."""

    values: dict[str, Any]


class Lines(Message, frozen=True, kw_only=True):
    """What was done, a line each."""

    lines: tuple[Words, ...]


# Instances -------------------------------------------------------------------------------------


class InstanceRequest(Message, frozen=True, kw_only=True):
    name: Name


class StartRequest(Message, frozen=True, kw_only=True):
    """Start an instance; `definition` is the table that a file would hold.

    A node whose copy of the cluster's state is older than `revision` refuses.
    """

    name: Name
    definition: dict[str, Any]
    revision: Number = 0


class StopRequest(Message, frozen=True, kw_only=True):
    name: Name
    timeout_s: Timeout = 60.0
    force: bool = False


class Instance(Message, frozen=True, kw_only=True):
    """`kvmsec.agent.InstanceInfo`."""

    name: Words
    state: Literal["starting", "running", "stopping", "stopped", "crashed", "unknown"]
    reason: Words | None = None
    pid: Number | None = None
    uid: Uid | None = None
    user: Words | None = None
    security_model: Words | None = None
    accelerator: Words | None = None
    memory_mib: Number | None = None
    vcpus: Number | None = None
    started_at: Time | None = None
    resident_bytes: Number | None = None
    cpu_s: float | None = None
    autostart: bool = False
    details: dict[str, Any] = {}


class Instances(Message, frozen=True, kw_only=True):
    instances: tuple[Instance, ...]


class Log(Message, frozen=True, kw_only=True):
    """`kvmsec.agent.InstanceLog`, each part cut to its last 256 KiB."""

    kvmsec: str
    qemu: str
    serial: str


class EventsRequest(Message, frozen=True, kw_only=True):
    """Wait at most `timeout_s` for events after `cursor` (None: from now on)."""

    cursor: Number | None = None
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 30.0


class Event(Message, frozen=True, kw_only=True):
    """`kvmsec.agent.Event`."""

    at: Time
    instance: Words
    state: Literal["starting", "running", "stopping", "stopped", "crashed", "unknown"]
    reason: Words | None = None


class Events(Message, frozen=True, kw_only=True):
    """What happened; `lost` events were too old to be kept. Go on from `cursor`."""

    cursor: Number
    events: tuple[Event, ...]
    lost: Number = 0


# The cluster's state ---------------------------------------------------------------------------


class State(Message, frozen=True, kw_only=True):
    """The cluster's state as its store keeps it (`kvmsec.model.cluster`)."""

    revision: Number
    format: Number
    document: dict[str, Any] | None


class Revision(Message, frozen=True, kw_only=True):
    revision: Number


# Certificates ----------------------------------------------------------------------------------


class PrepareRequest(Message, frozen=True, kw_only=True):
    """Trust these anchors from now on, and make a new key (`wants_key`) to be signed."""

    anchors: Pem
    wants_key: bool = True
    key_kind: Literal["ed25519", "p256", "rsa3072"] = "ed25519"


class Prepared(Message, frozen=True, kw_only=True):
    """The request (PKCS #10) for a certificate of the new key; None where none was wanted."""

    signing_request: Pem | None


class CommitRequest(Message, frozen=True, kw_only=True):
    """Serve and call with this certificate of the key that was prepared."""

    certificate: Pem


class FinishRequest(Message, frozen=True, kw_only=True):
    """Trust these anchors alone, and forget what a rollback would need."""

    anchors: Pem


class FileRequest(Message, frozen=True, kw_only=True):
    """Put one of the files that a candidate may hand out in place; None removes it."""

    name: Literal["server.pem", "server.key", "certless.pem"]
    content: Pem | None


# Joining ---------------------------------------------------------------------------------------


class JoinRequest(Message, frozen=True, kw_only=True):
    """The master shows that it knows the token, bound to both certificates of the connection."""

    proof: Fingerprint
    node_name: Name
    node_uuid: UUID


class JoinAnswer(Message, frozen=True, kw_only=True):
    """The node shows the same, and asks for its certificate."""

    proof: Fingerprint
    signing_request: Pem


class AdmitRequest(Message, frozen=True, kw_only=True):
    """What makes a member of a node: its certificate, the anchor, the cluster's state."""

    proof: Fingerprint
    anchors: Pem
    certificate: Pem
    state: State

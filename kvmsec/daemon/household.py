"""This node as a member of a cluster: its copy of the state, its keys, what others may order."""

import importlib.metadata
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING
from uuid import UUID

from kvmsec.agent import Finding
from kvmsec.daemon.joining import Joining
from kvmsec.daemon.remote_orders import require_allowed
from kvmsec.errors import CopyRefused, InstancesRun, KvmsecError, NoCluster, UidsInUse
from kvmsec.model.cluster import FORMAT, Cluster, document_of
from kvmsec.model.instance import InstanceDefinition
from kvmsec.node.candidates import write_candidates
from kvmsec.node.local import LocalNode
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import OLDEST_PROTOCOL, PROTOCOL
from kvmsec.rpc.wire import Caller
from kvmsec.store.freshness import require_revision
from kvmsec.store.identity import Identity
from uidpool.ranges import UidRanges

if TYPE_CHECKING:
    from kvmsec.cluster.members.arriving import Arrival
    from kvmsec.pki.files import KeyFiles
    from kvmsec.rpc.household import Household as HouseholdProtocol
    from kvmsec.rpc.household import Threshold

    def _is_whole(household: "Household") -> HouseholdProtocol:
        return household

    def _has_a_threshold(household: "Household") -> Threshold:
        return household


class NotInvited(KvmsecError):
    """Somebody would have this node join a cluster that it was given no token of."""

    def __init__(self) -> None:
        super().__init__(
            "this node was invited to no cluster",
            hint="run `kvmsec node invite NAME` on the master, and take the token here",
        )


class Household:
    """`kvmsec.rpc.household.Household` and `Threshold` of this node."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._host = node.host
        self._store = node.host.store
        self.joining = Joining(node.host.paths, node.host.store)

    @cached_property
    def _files(self) -> "KeyFiles":
        from kvmsec.pki.files import KeyFiles  # cryptography, which an idle daemon has no need of

        return KeyFiles(self._host.paths.key_files)

    # Who this is -------------------------------------------------------------------------------

    async def info(self) -> m.NodeInfo:
        identity = self._identity()
        cluster, revision = self._store.load()
        return m.NodeInfo(
            name=self._name(cluster, identity.uuid),
            uuid=identity.uuid,
            cluster_uuid=None if cluster is None else cluster.uuid,
            version=importlib.metadata.version("kvmsec"),
            protocols=(OLDEST_PROTOCOL, PROTOCOL),
            time=datetime.now(UTC),
            revision=revision,
            confirmed_at=identity.confirmed_at,
            certless_until=self._certless_until(),
        )

    def _identity(self) -> Identity:
        identity = self._store.identity()
        if identity is None:
            raise NoCluster
        return identity

    def _name(self, cluster: Cluster | None, uuid: UUID) -> str:
        """As the cluster has it: a host name that has changed makes no other node of it."""
        member = None if cluster is None else cluster.member(uuid)
        return self._node.name if member is None else member.name

    def _certless_until(self) -> datetime | None:
        if not (self._host.paths.key_files / "certless.pem").exists():
            return None
        from kvmsec.pki.certificates import facts_of

        common = self._files.usable_certless(datetime.now(UTC))
        return None if common is None else facts_of(common.certificate_pem).not_after

    async def examine(self, pool: UidRanges) -> m.Examination:
        from kvmsec.daemon.examination import examine

        return await examine(self._node, self._files, await self.info(), pool)

    async def provision(self, pool: UidRanges) -> m.Provisioned:
        from kvmsec.node import provisioning

        plan = provisioning.plan(self._host.paths, pool)
        await provisioning.apply(plan)
        return m.Provisioned(made=str(plan.create), kept=str(plan.present))

    async def leave(self) -> None:
        """Forget the cluster, the certificates last: until then the master may ask again.

        Raises InstancesRun and UidsInUse; this node stays a member then.
        """
        if running := await self._node.running_instances():
            raise InstancesRun(running)
        if held := await self._node.held_uids():
            raise UidsInUse(
                "these uids of the cluster's pool are still held here",
                held,
                hint="clean them with `kvmsec uids release UID` on this node",
            )
        self._store.leave()
        await self._node.sync_rules()
        await self._node.forget_resting()
        self._files.remove_all()

    # The cluster's state -----------------------------------------------------------------------

    async def get_state(self) -> m.State:
        cluster, revision = self._store.load()
        document = None if cluster is None else document_of(cluster)
        return m.State(revision=revision, format=FORMAT, document=document)

    async def put_state(self, state: m.State) -> int:
        """Take a copy over, and the list of those that may order with it."""
        if state.document is None:
            raise CopyRefused("it is empty")
        revision = self._store.put_copy(
            state.document, state.format, state.revision, at=datetime.now(UTC)
        )
        write_candidates(self._host.paths, self._store)
        return revision

    # Certificates ------------------------------------------------------------------------------

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared:
        from kvmsec.pki.keys import KeyKind

        identity = self._identity()
        cluster, _ = self._store.load()
        signing_request = self._files.prepare(
            request.anchors,
            request.wants_key,
            node_name=self._name(cluster, identity.uuid),
            node_uuid=identity.uuid,
            kind=KeyKind(request.key_kind),
        )
        return m.Prepared(signing_request=signing_request)

    async def commit(self, request: m.CommitRequest) -> None:
        self._files.commit(request.certificate)

    async def rollback(self) -> None:
        self._files.rollback()

    async def finish(self, request: m.FinishRequest) -> None:
        self._files.finish(request.anchors)

    async def put_file(self, request: m.FileRequest) -> None:
        self._files.put(request.name, request.content)

    # The threshold -----------------------------------------------------------------------------

    async def admit_start(
        self, definition: InstanceDefinition, revision: int, caller: Caller | None
    ) -> None:
        """Hold a start to this node's copy and, where another node ordered it, to `[remote]`."""
        require_revision(self._store.load()[1], revision)
        if caller is not None:
            require_allowed(
                definition.machine,
                self._host.config.remote,
                security_domain=definition.security_domain,
            )

    async def doctor(self) -> tuple[Finding, ...]:
        from kvmsec.daemon.doctor import doctor

        return await doctor(self._node, self._host)

    async def hello(self, request: m.JoinRequest, caller: Caller | None) -> m.JoinAnswer:
        arrival, fingerprint = self._arrival(caller)
        return arrival.hello(request, fingerprint)

    async def admit(self, request: m.AdmitRequest, caller: Caller | None) -> m.NodeInfo:
        arrival, fingerprint = self._arrival(caller)
        arrival.admit(request, fingerprint)
        await self._node.sync_rules()
        return await self.info()

    def _arrival(self, caller: Caller | None) -> "tuple[Arrival, str]":
        """What answers a join. The proofs are bound to certificates, so it comes over TLS alone."""
        arrival = None if caller is None else self.joining.arrival()
        if arrival is None or caller is None:
            raise NotInvited
        return arrival, caller.fingerprint

"""A node that is somewhere else: what anyone may ask of one, over any transport."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kvmsec.agent import Event, Finding, InstanceInfo, InstanceLog, UidState
from kvmsec.model.instance import InstanceDefinition, document_of
from kvmsec.rpc import messages as m
from kvmsec.rpc import values
from kvmsec.rpc.errors import BadMessage
from kvmsec.rpc.transport import Transport
from uidpool.ranges import UidRanges

if TYPE_CHECKING:
    from kvmsec.rpc.household import Household
    from kvmsec.rpc.service import Node

    def _agent_is_whole(agent: "RemoteAgent") -> Node:
        return agent

    def _household_is_whole(household: "RemoteHousehold") -> Household:
        return household


_T = TypeVar("_T", bound=m.Message)

_POLL_S: Final = 30.0
"""How long a node holds back its answer while nothing happens; below what any idle limit allows."""


async def _ask(transport: Transport, name: str, request: m.Message, response: type[_T]) -> _T:
    answer = await transport.call(name, request)
    if not isinstance(answer, response):
        raise BadMessage(None, f"{name} was answered with {type(answer).__name__}")
    return answer


class RemoteHousehold:
    """`kvmsec.rpc.household.Household` over a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def info(self) -> m.NodeInfo:
        return await _ask(self._transport, "node.info", m.Nothing(), m.NodeInfo)

    async def examine(self, pool: UidRanges) -> m.Examination:
        request = m.PoolRequest(uids=str(pool))
        return await _ask(self._transport, "node.examine", request, m.Examination)

    async def provision(self, pool: UidRanges) -> m.Provisioned:
        request = m.PoolRequest(uids=str(pool))
        return await _ask(self._transport, "users.provision", request, m.Provisioned)

    async def leave(self) -> None:
        await _ask(self._transport, "node.leave", m.Nothing(), m.Nothing)

    async def get_state(self) -> m.State:
        return await _ask(self._transport, "state.get", m.Nothing(), m.State)

    async def put_state(self, state: m.State) -> int:
        return (await _ask(self._transport, "state.put", state, m.Revision)).revision

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared:
        return await _ask(self._transport, "certificates.prepare", request, m.Prepared)

    async def commit(self, request: m.CommitRequest) -> None:
        await _ask(self._transport, "certificates.commit", request, m.Nothing)

    async def rollback(self) -> None:
        await _ask(self._transport, "certificates.rollback", m.Nothing(), m.Nothing)

    async def finish(self, request: m.FinishRequest) -> None:
        await _ask(self._transport, "certificates.finish", request, m.Nothing)

    async def put_file(self, request: m.FileRequest) -> None:
        await _ask(self._transport, "files.put", request, m.Nothing)

    async def hello(self, request: m.JoinRequest) -> m.JoinAnswer:
        """Show a node that is to join that we know its token."""
        return await _ask(self._transport, "join.hello", request, m.JoinAnswer)

    async def admit(self, request: m.AdmitRequest) -> m.NodeInfo:
        """Make it a member."""
        return await _ask(self._transport, "join.admit", request, m.NodeInfo)


class RemoteAgent:
    """`kvmsec.agent.Agent` and `kvmsec.cluster.nodes.ClusterNode` over a transport.

    Every call raises what its transport raises; a Fault of the node comes back as a RemoteFault
    whose `kind` is the name of its class there. `revision` is that of the cluster's state which
    starts are ordered from.
    """

    def __init__(self, transport: Transport, name: str, *, revision: int = 0) -> None:
        self._transport = transport
        self._name = name
        self.revision = revision
        self.household = RemoteHousehold(transport)

    @property
    def name(self) -> str:
        return self._name

    async def _call(self, name: str, request: m.Message, response: type[_T]) -> _T:
        return await _ask(self._transport, name, request, response)

    async def _order(self, name: str, request: m.Message | None = None) -> None:
        await self._call(name, request or m.Nothing(), m.Nothing)

    # Instances ---------------------------------------------------------------------------

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        request = m.StartRequest(
            name=definition.name, definition=document_of(definition), revision=self.revision
        )
        return values.instance_info(await self._call("instance.start", request, m.Instance))

    async def stop(
        self, name: str, *, timeout_s: float = 60.0, force: bool = False
    ) -> InstanceInfo:
        request = m.StopRequest(name=name, timeout_s=timeout_s, force=force)
        return values.instance_info(await self._call("instance.stop", request, m.Instance))

    async def reboot(self, name: str) -> None:
        await self._order("instance.reboot", m.InstanceRequest(name=name))

    async def list(self) -> tuple[InstanceInfo, ...]:
        found = await self._call("instance.list", m.Nothing(), m.Instances)
        return tuple(map(values.instance_info, found.instances))

    async def info(self, name: str) -> InstanceInfo:
        request = m.InstanceRequest(name=name)
        return values.instance_info(await self._call("instance.info", request, m.Instance))

    async def log(self, name: str) -> InstanceLog:
        return values.log(await self._call("instance.log", m.InstanceRequest(name=name), m.Log))

    async def events(self) -> AsyncIterator[Event]:
        """What happens from the first `anext` on; more than 256 at once lose the oldest."""
        here = await self._call("instance.events", m.EventsRequest(timeout_s=0), m.Events)
        while True:
            for each in here.events:
                yield values.event(each)
            request = m.EventsRequest(cursor=here.cursor, timeout_s=_POLL_S)
            here = await self._call("instance.events", request, m.Events)

    # Uids and rules ----------------------------------------------------------------------

    async def uid_states(self, *, with_free: bool = False) -> tuple[UidState, ...]:
        request = m.UidStatesRequest(with_free=with_free)
        found = await self._call("uids.states", request, m.UidStates)
        return tuple(map(values.uid_state, found.states))

    async def release_uid(self, uid: int) -> UidState:
        return values.uid_state(await self._call("uids.release", m.UidRequest(uid=uid), m.UidState))

    async def apply_rules(self) -> None:
        await self._order("rules.apply")

    async def verify_rules(self) -> tuple[Finding, ...]:
        return values.findings(await self._call("rules.verify", m.Nothing(), m.Findings))

    async def show_rules(self) -> Mapping[str, Any]:
        return (await self._call("rules.show", m.Nothing(), m.Shown)).values

    async def remove_rules(self, *, force: bool = False) -> None:
        await self._order("rules.remove", m.Forced(force=force))

    async def doctor(self) -> tuple[Finding, ...]:
        return values.findings(await self._call("node.doctor", m.Nothing(), m.Findings))

    async def reconcile(self) -> tuple[str, ...]:
        return (await self._call("node.reconcile", m.Nothing(), m.Lines)).lines

    # What a cluster asks of a node -------------------------------------------------------

    async def check_pool(self, uids: UidRanges) -> Sequence[m.Problem]:
        request = m.PoolRequest(uids=str(uids))
        return (await self._call("users.check", request, m.Problems)).problems

    async def held_uids(self) -> Mapping[int, str]:
        return (await self._call("uids.held", m.Nothing(), m.Held)).holders

    async def running_instances(self) -> Sequence[str]:
        return (await self._call("uids.held", m.Nothing(), m.Held)).instances

    async def sync_rules(self) -> None:
        await self._order("rules.sync")

    async def forget_resting(self) -> None:
        await self._order("uids.forget_resting")

"""A node that answers calls: each call's message becomes a question to it, its answer a message."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self, cast

from kvmsec.agent import Agent
from kvmsec.cluster.nodes import ClusterNode
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault
from kvmsec.model.instance import definition_from
from kvmsec.rpc import messages as m
from kvmsec.rpc import values, wire
from kvmsec.rpc.calls import Call
from kvmsec.rpc.household import Household, Threshold
from kvmsec.rpc.recent import RecentEvents
from kvmsec.rpc.shared_look import SharedLook
from kvmsec.rpc.wire import Caller
from uidpool.ranges import UidRanges


class Node(Agent, ClusterNode, Protocol):
    """All that anyone may ask of a node, and what a cluster does."""


class Home(Household, Threshold, Protocol):
    """What a node's daemon answers itself."""


class Unexpected(KvmsecError):
    """A fault of kvmsec itself, or of its host; the daemon's log has more."""


Answering = Callable[[Call, m.Message, Caller | None], Awaitable[m.Message]]
"""Answers a decoded request; `Service.answer`, or what judges and logs around it."""
_Handler = Callable[[Any, Caller | None], Awaitable[m.Message]]


async def respond(
    answering: Answering,
    caller: Caller | None,
    name: str,
    protocol: int,
    body: bytes,
    *,
    on_failure: Callable[[str, BaseException], None] = lambda name, error: None,
) -> bytes:
    """Decode a request, have it answered, and encode what came of it; raises nothing.

    `on_failure` is told the call and the exception where it is no Fault: a peer learns its class
    alone, since its words may name what is none of the peer's business.
    """
    try:
        call = wire.find_call(name, protocol)
        request = wire.decode_request(call, body)
        answer = await answering(call, request, caller)
        return wire.encode_answer(answer, protocol, limit_bytes=call.answer_limit_bytes)
    except Fault as error:
        return wire.encode_fault(error)
    except OSError as error:
        on_failure(name, error)
        return wire.encode_fault(Unexpected(f"{error.strerror or type(error).__name__}"))
    except Exception as error:
        on_failure(name, error)
        return wire.encode_fault(
            Unexpected(
                f"{name[:80]} failed unexpectedly ({type(error).__name__})",
                hint="the log of the node's daemon has the rest",
            )
        )


class Service:
    """Answers every call for a node; a context manager that follows the node's events meanwhile."""

    def __init__(self, node: Node, home: Home) -> None:
        self._node = node
        self._home = home
        self._recent = RecentEvents()
        self._following: asyncio.Task[None] | None = None
        self._handlers: Final[Mapping[str, _Handler]] = _handlers(self, node, home)

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._following

    async def answer(self, call: Call, request: m.Message, caller: Caller | None) -> m.Message:
        """Answer a request of the call's type; `caller` is None for root of this host.

        Raises the node's Faults. Whoever calls this has judged the caller (`Call.right`).
        """
        return await self._handlers[call.name](request, caller)

    async def _follow(self) -> None:
        async for event in self._node.events():
            self._recent.add(event)

    # What takes more than a line -----------------------------------------------------------

    async def start(self, request: m.StartRequest, caller: Caller | None) -> m.Message:
        definition = definition_from(request.definition, request.name, source="the order")
        await self._home.admit_start(definition, request.revision, caller)
        return values.instance_message(await self._node.start(definition))

    async def stop(self, request: m.StopRequest, _: Caller | None) -> m.Message:
        return values.instance_message(
            await self._node.stop(request.name, timeout_s=request.timeout_s, force=request.force)
        )

    async def events(self, request: m.EventsRequest, _: Caller | None) -> m.Message:
        if self._following is None or self._following.done():
            raise Unexpected(
                "nobody follows the events of this node", hint="restart its kvmsec daemon"
            )
        return await self._recent.after(request.cursor, request.timeout_s)

    async def check_users(self, request: m.PoolRequest, _: Caller | None) -> m.Message:
        found = await self._node.check_pool(UidRanges.parse(request.uids))
        return m.Problems(
            problems=tuple(
                m.Problem(message=values.words(one.message), hint=values.maybe_words(one.hint))
                for one in found
            )
        )

    async def held(self, _: m.Nothing, __: Caller | None) -> m.Message:
        holders = await self._node.held_uids()
        return m.Held(
            holders={uid: values.words(who) for uid, who in holders.items()},
            instances=tuple(await self._node.running_instances()),
        )


def _handlers(service: Service, node: Node, home: Home) -> Mapping[str, _Handler]:
    return (
        _node_handlers(node, home)
        | _uid_and_rule_handlers(service, node)
        | _instance_handlers(service, node)
        | _cluster_handlers(home)
    )


def _node_handlers(node: Node, home: Home) -> dict[str, _Handler]:
    async def info(_: m.Nothing, __: Caller | None) -> m.Message:
        return await home.info()

    examined = SharedLook(home.doctor)  # It starts programs, and a peer may ask without end.

    async def doctor(_: m.Nothing, __: Caller | None) -> m.Message:
        return values.findings_message(await examined.found())

    async def examine(request: m.PoolRequest, _: Caller | None) -> m.Message:
        return await home.examine(UidRanges.parse(request.uids))

    async def reconcile(_: m.Nothing, __: Caller | None) -> m.Message:
        return m.Lines(lines=tuple(map(values.words, await node.reconcile())))

    async def provision(request: m.PoolRequest, _: Caller | None) -> m.Message:
        return await home.provision(UidRanges.parse(request.uids))

    return {
        "node.info": info,
        "node.doctor": doctor,
        "node.examine": examine,
        "node.reconcile": reconcile,
        "node.leave": _done(lambda _: home.leave()),
        "users.provision": provision,
    }


def _uid_and_rule_handlers(service: Service, node: Node) -> dict[str, _Handler]:
    async def states(request: m.UidStatesRequest, _: Caller | None) -> m.Message:
        found = await node.uid_states(with_free=request.with_free)
        return m.UidStates(states=tuple(map(values.uid_state_message, found)))

    async def release(request: m.UidRequest, _: Caller | None) -> m.Message:
        return values.uid_state_message(await node.release_uid(request.uid))

    async def show(_: m.Nothing, __: Caller | None) -> m.Message:
        return m.Shown(values=values.plain(await node.show_rules()))

    async def verify(_: m.Nothing, __: Caller | None) -> m.Message:
        return values.findings_message(await node.verify_rules())

    return {
        "users.check": service.check_users,
        "uids.held": service.held,
        "uids.states": states,
        "uids.release": release,
        "uids.forget_resting": _done(lambda _: node.forget_resting()),
        "rules.show": show,
        "rules.verify": verify,
        "rules.apply": _done(lambda _: node.apply_rules()),
        "rules.sync": _done(lambda _: node.sync_rules()),
        "rules.remove": _done(lambda request: node.remove_rules(force=request.force)),
    }


def _instance_handlers(service: Service, node: Node) -> dict[str, _Handler]:
    async def every(_: m.Nothing, __: Caller | None) -> m.Message:
        return m.Instances(instances=tuple(map(values.instance_message, await node.list())))

    async def info(request: m.InstanceRequest, _: Caller | None) -> m.Message:
        return values.instance_message(await node.info(request.name))

    async def log(request: m.InstanceRequest, _: Caller | None) -> m.Message:
        return values.log_message(await node.log(request.name))

    return {
        "instance.list": every,
        "instance.info": info,
        "instance.log": log,
        "instance.events": service.events,
        "instance.start": service.start,
        "instance.stop": service.stop,
        "instance.reboot": _done(lambda request: node.reboot(request.name)),
    }


def _cluster_handlers(home: Home) -> dict[str, _Handler]:
    async def get_state(_: m.Nothing, __: Caller | None) -> m.Message:
        return await home.get_state()

    async def put_state(request: m.State, _: Caller | None) -> m.Message:
        return m.Revision(revision=await home.put_state(request))

    async def prepare(request: m.PrepareRequest, _: Caller | None) -> m.Message:
        return await home.prepare(request)

    return {
        "state.get": get_state,
        "state.put": put_state,
        "certificates.prepare": prepare,
        "certificates.commit": _done(home.commit),
        "certificates.rollback": _done(lambda _: home.rollback()),
        "certificates.finish": _done(home.finish),
        "files.put": _done(home.put_file),
        "join.hello": cast(_Handler, home.hello),
        "join.admit": cast(_Handler, home.admit),
    }


def _done(act: Callable[[Any], Awaitable[None]]) -> _Handler:
    """A handler for what answers nothing but that it is done."""

    async def handler(request: m.Message, _: Caller | None) -> m.Message:
        await act(request)
        return m.Nothing()

    return handler

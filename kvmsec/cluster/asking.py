"""Asking many nodes at once: who answered what, who refused, and who did not answer."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, Protocol, TypeVar

from attrs import frozen

from kvmsec.linux.errors import Fault

ASK_S: Final = 20.0
"""How long a look at all nodes may take: twice what one call may (`kvmsec.rpc.calls`)."""
ORDER_S: Final = 150.0
"""The same for orders, which may have many rules to put in force."""

SILENCE: Final = frozenset({"Unreachable", "CallTimedOut", "Overloaded"})
"""The kinds of error that say that a node gave no answer, rather than that it said no."""

AT_ONCE: Final = 96
"""Nodes that are asked at the same time. A call's own deadline begins with it, and where each of
500 waits for the handshakes of all others, none is answered within it."""

_GRACE_S: Final = 0.5


class Named(Protocol):
    """Anything that a node answers by the name of."""

    @property
    def name(self) -> str: ...


_T = TypeVar("_T")
_N = TypeVar("_N", bound=Named)


@frozen(kw_only=True)
class Answers(Generic[_T]):
    """What became of a question, by the node's name; each node is in one of the three.

    `silent` says why there was no answer: whether an order was carried out is not known then.
    """

    answered: Mapping[str, _T]
    refused: Mapping[str, Fault | OSError]
    silent: Mapping[str, str]


async def ask_all(
    nodes: Sequence[_N], call: Callable[[_N], Awaitable[_T]], *, deadline_s: float = ASK_S
) -> Answers[_T]:
    """Ask every node, `AT_ONCE` at a time, the first ones first.

    Returns `deadline_s` seconds and a moment later at the latest. An error that is no Fault and no
    OSError is a bug and is raised, once every node was heard.
    """
    turns = asyncio.Semaphore(AT_ONCE)
    tasks = {node.name: asyncio.ensure_future(_asked(call, node, turns)) for node in nodes}
    try:
        if tasks:
            await asyncio.wait(tasks.values(), timeout=deadline_s)
    finally:
        await _give_up([task for task in tasks.values() if not task.done()])
    return _sorted(tasks, deadline_s)


async def _give_up(late: "Sequence[asyncio.Future[_T]]") -> None:
    """Cancel what is late; one that won't end holds nobody up."""
    for task in late:
        task.add_done_callback(_forget)
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_GRACE_S)


def _forget(task: "asyncio.Future[_T]") -> None:
    """Nobody listens any more to what became of it."""
    if not task.cancelled():
        task.exception()


async def _asked(call: Callable[[_N], Awaitable[_T]], node: _N, turns: asyncio.Semaphore) -> _T:
    async with turns:
        return await call(node)


def _sorted(tasks: Mapping[str, "asyncio.Future[_T]"], deadline_s: float) -> Answers[_T]:
    answered: dict[str, _T] = {}
    refused: dict[str, Fault | OSError] = {}
    silent: dict[str, str] = {}
    for name, task in tasks.items():
        if not task.done() or task.cancelled():
            silent[name] = f"no answer within {deadline_s:g} s"
            continue
        match task.exception():
            case None:
                answered[name] = task.result()
            case Fault() | OSError() as error if not is_silence(error):
                refused[name] = error
            case Fault() | OSError() as error:
                silent[name] = str(error)
            case error:
                raise error
    return Answers(answered=answered, refused=refused, silent=silent)


def is_silence(error: BaseException) -> bool:
    """Whether a node gave no answer; a refusal, even of trust, is one."""
    return isinstance(error, TimeoutError) or kind_of(error) in SILENCE


def is_out_of_reach(error: BaseException) -> bool:
    """Whether a node is silent, or trusts nobody of the cluster: as one that has left it."""
    return is_silence(error) or kind_of(error) == "Refused"


def kind_of(error: BaseException) -> str:
    """The name of an error's class where it was raised, this node or another."""
    kind = getattr(error, "kind", None)
    return kind if isinstance(kind, str) else type(error).__name__

"""Drawing and releasing uids while the event loop runs on.

What is quick is done in place: the records, and a look of a few milliseconds that proves most uids
clean. What may take long is done in a child process, or waited for: another process that changes
the records or releases the same uid, a look through many files, and the cleaning of a uid that has
something.
"""

from typing import Any, Final, TypeVar

import msgspec

from kvmsec.linux.children import start_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from kvmsec.linux.locks import FileLock
from kvmsec.node.waiting import acquire, collect
from uidpool.claims import LOCK_TIMEOUT_S, Claims, Lease, LeaseKey, Quarantined, Released
from uidpool.files import let_look_deep
from uidpool.ranges import UidRanges
from uidpool.steps import Clean, Look, Step, Verdict, Work
from uidpool.usage import is_evidently_clean

_T = TypeVar("_T")

# A sweep waits for others' and takes ten seconds at most, a scan twenty, and there are two.
CLEANING_TIMEOUT_S: Final = 120.0


async def draw(
    claims: Claims, pool: UidRanges, *, instance: str, generation: str, reuse_delay_s: float
) -> Lease:
    """As `Claims.draw`. Raises ChildFailed and ChildTimedOut too; nothing is leased then."""
    return await _carry_out(claims, claims.drawing(pool, instance, generation, reuse_delay_s))


async def release(claims: Claims, key: LeaseKey) -> Released | Quarantined:
    """As `Claims.release`. Where this is cancelled or killed the lease stays, as it was."""
    return await _carry_out(claims, claims.releasing(key))


async def end_everything(claims: Claims, key: LeaseKey) -> None:
    """As `Claims.ending`: the lease stays, whatever is left."""
    await _carry_out(claims, claims.ending(key))


async def retry(claims: Claims, uid: int) -> Released | Quarantined:
    """As `Claims.retry`."""
    return await _carry_out(claims, claims.retrying(uid))


async def forget_resting(claims: Claims) -> None:
    """Forget which uids of the root rest, and all that is there where nothing else is."""
    await _carry_out(claims, claims.forgetting_resting())
    await _carry_out(claims, claims.removing_if_unused())


async def _carry_out(claims: Claims, work: Work[_T]) -> _T:
    """`uidpool.steps.carry_out` for an event loop; a cancellation is the work's to undo, too."""
    locks: list[FileLock] = []
    try:
        step = next(work)
        while True:
            try:
                answer = await _take(claims, step, [one for one in locks if one.is_held])
                if isinstance(step, FileLock):
                    locks.append(step)
            except BaseException as error:
                step = work.throw(error)
            else:
                step = work.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


async def _take(claims: Claims, step: Step, held: list[FileLock]) -> Verdict | None:
    if isinstance(step, FileLock):
        await acquire(step, LOCK_TIMEOUT_S)
        return None
    if is_evidently_clean(step.uid, claims.settled):
        return Verdict(is_clean=True, reason="nothing")
    try:
        return await _take_in_child(claims, step, held)
    except (ChildFailed, ChildTimedOut) as error:
        if isinstance(step, Look):
            raise
        # What kept it from being cleaned would do so again: the instance's name is free again.
        return Verdict(is_clean=False, reason=error.message, is_incomplete=True)


async def _take_in_child(claims: Claims, step: Look | Clean, held: list[FileLock]) -> Verdict:
    """Have a child take it that holds the locks of the whole work, too.

    Where the launcher is killed, nobody else cleans the uid, and gives it away as clean, before
    this child has ended as well.
    """

    def take() -> Any:
        let_look_deep()
        return msgspec.to_builtins(claims.take(step))

    doing = "cleaning" if isinstance(step, Clean) else "looking at"
    keep = [one.fileno() for one in held]
    child = start_child(take, what=f"{doing} uid {step.uid}", keep=keep)
    return msgspec.convert(await collect(child, CLEANING_TIMEOUT_S), Verdict)

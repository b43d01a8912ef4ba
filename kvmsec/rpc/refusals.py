"""What a server refused, told for the log: bounded words, and no line for each of ten thousand."""

from collections.abc import Callable
from typing import Final

from attrs import frozen

from kvmsec.rpc.errors import bounded

_WINDOW_S: Final = 10.0
_MOST_KNOWN: Final = 1024


@frozen(kw_only=True)
class Refusal:
    """Somebody was refused; `more` like it had come since the last that was told."""

    address: str
    reason: str
    peer: str | None = None
    call: str | None = None
    more: int = 0


@frozen
class _Told:
    at: float
    kept_back: int


class Refusals:
    """Tells of refusals, of each kind from each address once in ten seconds."""

    def __init__(self, tell: Callable[[Refusal], None]) -> None:
        self._tell = tell
        self._told: dict[tuple[str, str], _Told] = {}

    def add(
        self,
        address: str,
        reason: str,
        now: float,
        *,
        peer: str | None = None,
        call: str | None = None,
    ) -> None:
        """`now` is the monotonic time; what a peer chose among the words may be anything."""
        key = (address, reason[:80])
        before = self._told.pop(key, None)
        if before is not None and now - before.at < _WINDOW_S:
            self._told[key] = _Told(before.at, before.kept_back + 1)
            return
        self._told[key] = _Told(now, 0)
        if len(self._told) > _MOST_KNOWN:
            del self._told[next(iter(self._told))]
        self._tell(
            Refusal(
                address=address,
                reason=_one_line(reason),
                peer=_one_line(peer) if peer else None,
                call=_one_line(call) if call else None,
                more=before.kept_back if before else 0,
            )
        )


def _one_line(words: str) -> str:
    return bounded(words[:400].replace("\n", " "))

"""How the front is kept alive, and when that is given up."""

import asyncio
import errno
import os
from collections.abc import Sequence
from typing import Any

import pytest

from kvmsec.daemon import front_keeper
from kvmsec.daemon.confined_child import Start
from kvmsec.daemon.front_keeper import FrontFailed, FrontKeeper
from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.rpc.frames import Request
from tests.unit.kvmsec.daemon.a_start import START


class Source:
    """What stands for a member's files."""

    def signature(self) -> Any:
        return ((1, 1, 1),)

    def message(self) -> TrustMessage:
        return TrustMessage(pair="", anchors="", members={}, candidates={})


def keeper(said: list[str]) -> FrontKeeper:
    async def answer(request: Request) -> bytes:
        return b""

    async def follow() -> None:
        pass

    return FrontKeeper(
        lambda: START,
        Source(),  # type: ignore[arg-type]
        answer,
        lambda: (),
        said.append,
        follow,
    )


def test_a_fork_that_the_kernel_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as a front may die: the node may have too many processes for a moment only."""

    def refuse(start: Start, sockets: Sequence[Any]) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(front_keeper, "start_confined", refuse)
    monkeypatch.setattr(front_keeper, "_PAUSE_S", 0.0)
    monkeypatch.setattr(front_keeper, "_LOOK_S", 0.0)
    said: list[str] = []

    with pytest.raises(FrontFailed, match="5 times"):
        asyncio.run(keeper(said).run())

    refused = [line for line in said if "Resource temporarily unavailable" in line]
    assert len(refused) == 5
    assert said.count("the front is started again") == 4

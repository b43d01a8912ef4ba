"""A monitor is reached by its path, or what is in the way is said in time."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.monitor import (
    Monitor,
    MonitorTimedOut,
    MonitorUnreachable,
)


@pytest.mark.parametrize("depth", [0, 3])
def test_a_path_may_be_longer_than_a_socket_address(
    tmp_path: Path, serve_at: Callable[[Path, str], None], depth: int
) -> None:
    path = tmp_path.joinpath(*["d" * 60] * depth, "monitor")
    path.parent.mkdir(parents=True, exist_ok=True)
    serve_at(path, "greet(); answer(hear(), {'status': 'running'}); stay()")

    async def ask() -> str:
        async with await Monitor.connect(path) as monitor:
            return await monitor.status()

    assert asyncio.run(ask()) == "running"


def test_a_path_without_a_monitor_is_said(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.touch()
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(stale))

    for path in (tmp_path / "missing", plain, stale, tmp_path / ("x" * 200) / "missing"):
        with pytest.raises(MonitorUnreachable) as caught:
            asyncio.run(Monitor.connect(path))
        assert path.name in caught.value.message


def test_a_monitor_that_serves_another_is_given_up_in_time(
    tmp_path: Path, listen: Callable[[Path], socket.socket]
) -> None:
    listen(tmp_path / "monitor")
    waiting = socket.socket(socket.AF_UNIX)

    with waiting:
        waiting.connect(str(tmp_path / "monitor"))
        with pytest.raises(MonitorTimedOut) as caught:
            asyncio.run(Monitor.connect(tmp_path / "monitor", timeout_s=0.2))
    assert caught.value.what == "take a call"
    assert caught.value.hint is not None

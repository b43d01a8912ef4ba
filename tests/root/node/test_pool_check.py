"""A uid that something else runs under is no uid for the pool; an instance's own is."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmsec.linux.children import Child
from kvmsec.node import leasing
from kvmsec.node.local import LocalNode
from kvmsec.node.uids import used_by_others
from uidpool.claims import Claims
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]


def test_a_uid_that_something_else_runs_under_is_refused(
    uid: int, spawn: Spawn, tmp_path: Path
) -> None:
    async def problems() -> list[str]:
        node = LocalNode(tmp_path)
        try:
            return [one.message for one in await node.check_pool(UidRanges.of((uid, uid + 1)))]
        finally:
            await node.close()

    assert asyncio.run(problems()) == []
    child = spawn(uid)
    (said,) = asyncio.run(problems())
    assert said.startswith(f"uid {uid}: process {child.pid} (")


def test_a_uid_that_an_instance_holds_is_in_nobody_elses_use(
    uid: int, spawn: Spawn, tmp_path: Path
) -> None:
    claims = Claims(tmp_path / "run", tmp_path / "lib", root="/")
    host: Any = SimpleNamespace(claims=claims)
    own = UidRanges.of((uid, uid))
    drawn = leasing.draw(claims, own, instance="vm", generation="g1", reuse_delay_s=0)
    asyncio.run(drawn)  # type: ignore[arg-type]
    child = spawn(uid)
    assert list(used_by_others(host, own)) == []
    claims = Claims(tmp_path / "run2", tmp_path / "lib2", root="/")
    (problem,) = used_by_others(SimpleNamespace(claims=claims), own)  # type: ignore[arg-type]
    assert str(child.pid) in problem.message

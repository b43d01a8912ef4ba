"""The users of a pool are the host's: no root takes away those that another one draws from."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvmsec.node import provisioning
from kvmsec.node.provisioning import StillInPool
from kvmsec.paths import Paths
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

POOL = UidRanges.parse("245020-245023")


def test_users_of_a_pool_that_another_root_drew_from_are_not_removed(
    make_lab: Any, tmp_path: Path
) -> None:
    lab = make_lab(uid_pool=POOL)
    held = lab.start().uid
    free = POOL - UidRanges.of((held, held))
    with pytest.raises(StillInPool) as caught:
        asyncio.run(provisioning.remove(Paths(tmp_path), free))
    assert caught.value.uids == free
    assert str(lab.root) in (caught.value.hint or "")
    lab.stop()

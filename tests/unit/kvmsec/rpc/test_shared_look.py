"""Looks that are shared: never two at once, and none that began before somebody asked for it."""

import asyncio

import pytest

from kvmsec.rpc.shared_look import SharedLook


def test_many_who_ask_cost_two_looks_one_after_the_other() -> None:
    begun, under_way, gate = 0, 0, asyncio.Event()

    async def look() -> int:
        nonlocal begun, under_way
        begun, under_way = begun + 1, under_way + 1
        assert under_way == 1
        mine = begun
        await gate.wait()
        under_way -= 1
        return mine

    async def test() -> None:
        shared = SharedLook(look)
        first = asyncio.create_task(shared.found())
        while not begun:
            await asyncio.sleep(0)
        late = [asyncio.create_task(shared.found()) for _ in range(50)]
        await asyncio.sleep(0)
        gate.set()
        assert await first == 1
        assert await asyncio.gather(*late) == [2] * 50
        assert await shared.found() == 3

    asyncio.run(test())


def test_who_goes_leaves_the_look_to_the_others() -> None:
    async def look() -> str:
        await asyncio.sleep(0.01)
        return "found"

    async def test() -> None:
        shared = SharedLook(look)
        gone, stays = (asyncio.create_task(shared.found()) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == "found"

    asyncio.run(test())


def test_what_a_look_raises_is_raised_to_all_who_asked() -> None:
    async def look() -> None:
        raise OSError("unreadable")

    async def test() -> None:
        shared = SharedLook(look)
        for one in await asyncio.gather(shared.found(), shared.found(), return_exceptions=True):
            assert isinstance(one, OSError)
        with pytest.raises(OSError):
            await shared.found()

    asyncio.run(test())

import asyncio

from benchmarks.loop import Sample, host_cpu_s, interleave


def test_works_take_turns_and_nobody_always_follows_the_same_one() -> None:
    done: list[str] = []

    def work(name: str) -> object:
        async def once() -> Sample:
            done.append(name)
            return {"turn": float(len(done))}

        return once

    works = {name: work(name) for name in "abcd"}
    found = asyncio.run(interleave(20, works, warm_up=1))  # type: ignore[arg-type]

    rounds = [done[first : first + 4] for first in range(0, 84, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert {one[one.index("a") - 1] for one in rounds if one[0] != "a"} == set("bcd")
    assert found["a"]["turn"] == [
        float(4 * turn + one.index("a") + 1) for turn, one in enumerate(rounds) if turn
    ]


def test_work_moves_the_hosts_processor_time() -> None:
    before = host_cpu_s()
    while host_cpu_s() == before:
        pass

    assert host_cpu_s() > before

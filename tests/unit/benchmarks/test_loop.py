import asyncio

from benchmarks.loop import Sample, host_cpu_s, interleave


def test_works_take_turns_and_nobody_always_follows_the_same_one() -> None:
    done: list[str] = []

    def work(name: str) -> object:
        async def once() -> Sample:
            done.append(name)
            return {"turn": float(len(done))}

        return once

    works = {name: work(name) for name in "abc"}
    found = asyncio.run(interleave(2, works, warm_up=1))  # type: ignore[arg-type]

    assert done == [*"abc", *"bca", *"cab"]
    assert found == {"a": {"turn": [6, 8]}, "b": {"turn": [4, 9]}, "c": {"turn": [5, 7]}}


def test_work_moves_the_hosts_processor_time() -> None:
    before = host_cpu_s()
    while host_cpu_s() == before:
        pass

    assert host_cpu_s() > before

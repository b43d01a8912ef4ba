"""Work in a child: its result, its failures and its end."""

import asyncio
import os
import signal
import threading
import time
from typing import Any

import pytest

from kvmsec.linux import children
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, ManyThreads
from tests.unit.kvmsec.linux.working import (
    DEADLINE_S,
    fail_with,
    nothing_is_left,
    open_descriptors,
    run,
)

__all__ = ["nothing_is_left"]

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("value", [None, 0, "x\udc80", [1, {"a": [2.5, True]}], "y" * 900_000])
def test_the_value_comes_back(value: Any) -> None:
    assert run(lambda: value) == value


@pytest.mark.parametrize(
    ("error", "kind", "detail"),
    [
        (ValueError("what was wrong"), "ValueError", "what was wrong"),
        (FileNotFoundError(2, "No such file", "/x"), "FileNotFoundError", "'/x'"),
        (SystemExit(0), "SystemExit", "0"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit", "GeneratorExit"),
        (ValueError("z" * (2 << 20)), "ValueError", "zzz"),
    ],
)
def test_what_the_function_raises_is_told_and_never_reaches_the_parents_code(
    error: BaseException, kind: str, detail: str
) -> None:
    me = os.getpid()
    try:
        run(fail_with(error))
    except ChildFailed as failure:
        assert (failure.what, failure.kind) == ("working", kind)
        assert detail in failure.message
    finally:
        if os.getpid() != me:
            os._exit(99)


def test_a_result_that_json_has_no_word_for_is_told() -> None:
    with pytest.raises(ChildFailed) as raised:
        run(lambda: {1, 2})
    assert raised.value.kind == "TypeError"


def test_an_error_that_cannot_be_printed_ends_the_child_alone() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    with pytest.raises(ChildFailed) as raised:
        run(fail_with(Unspeakable()))
    assert raised.value.kind == "ChildProcessError"


def test_too_much_is_an_error_and_ends_the_child() -> None:
    with pytest.raises(ChildFailed) as raised:
        run(lambda: "x" * (children.RESULT_LIMIT_BYTES + 1))
    assert raised.value.kind == "OverflowError"


def test_an_endless_stream_costs_bounded_memory() -> None:
    def flood() -> None:
        while True:
            for name in os.listdir("/proc/self/fd"):
                if os.path.exists(f"/proc/self/fd/{name}") and int(name) > 2:
                    os.write(int(name), b"[" * 65536)

    with pytest.raises(ChildFailed) as raised:
        run(flood)
    assert raised.value.kind == "OverflowError"


@pytest.mark.parametrize(
    "nonsense", [b"[" * 500_000, b"\xff", b"{}", b"[1]", b'{"value"', b"7", b""]
)
def test_a_child_that_answers_nonsense_is_an_error(nonsense: bytes) -> None:
    def answer() -> None:
        os.write(open_descriptors()[3], nonsense)
        os._exit(3)

    with pytest.raises(ChildFailed, match="status 3") as raised:
        run(answer)
    assert raised.value.kind == "ChildProcessError"


def test_a_child_that_is_killed_is_an_error_that_names_the_signal() -> None:
    with pytest.raises(ChildFailed, match="signal 9"):
        run(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_that_stays_is_killed_at_its_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(ChildTimedOut, match=r"working did not end within 0\.2 s"):
        children.run_in_child(signal.pause, what="working", timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_a_child_that_answers_and_stays_does_not_hold_its_parent_up() -> None:
    """What a child does that an image's header took over: the launcher would wait for ever."""

    def answer_and_stay() -> None:
        os.write(open_descriptors()[3], b'{"value": 5}')
        os.closerange(3, 1000)
        signal.pause()

    with _within(5):
        assert run(answer_and_stay) == 5


def _within(seconds: float) -> Any:
    class Within:
        def __enter__(self) -> None:
            self.handler = signal.signal(signal.SIGALRM, self.interrupt)
            signal.setitimer(signal.ITIMER_REAL, seconds)

        def __exit__(self, *_: object) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.handler)

        def interrupt(self, *_: object) -> None:
            raise AssertionError(f"still waiting after {seconds} s")

    return Within()


def test_an_event_loop_collects_several_at_once_and_hears_of_no_signal() -> None:
    async def work() -> list[Any]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, lambda: None)
        started = [
            children.start_child(lambda turn=turn: turn, what="working") for turn in range(4)
        ]
        results = []
        for child in started:
            ready = asyncio.Event()
            loop.add_reader(child.fileno(), ready.set)
            await asyncio.wait_for(ready.wait(), DEADLINE_S)
            loop.remove_reader(child.fileno())
            results.append(child.collect(DEADLINE_S))
        process = await asyncio.create_subprocess_exec("false")
        assert await process.wait() == 1
        loop.remove_signal_handler(signal.SIGCHLD)
        return results

    before = signal.getsignal(signal.SIGCHLD)
    try:
        assert asyncio.run(work()) == [0, 1, 2, 3]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_that_was_closed_twice_or_after_its_result_is_fine() -> None:
    child = children.start_child(lambda: 1, what="working")
    assert child.collect(DEADLINE_S) == 1
    child.close()
    child.kill()


def test_a_process_with_several_threads_is_not_forked() -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(ManyThreads, match="2 threads") as caught:
            run(lambda: 1)
        assert "one thread" in (caught.value.hint or "")
    finally:
        done.set()
        other.join()
    for turn in range(20):
        other = threading.Thread(target=int)
        other.start()
        other.join()
        assert run(lambda turn=turn: turn) == turn

"""A function that is killed before its n-th change of a file, in a process of its own."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.link")


def killed_everywhere(function: Callable[[], object], reset: Callable[[], None]) -> Iterator[int]:
    """Run the function again and again, each time killed one change of a file later.

    Yields after each kill; ends after the run that nothing has killed.
    """
    for point in range(1000):
        reset()
        if not _is_killed(function, point):
            return
        yield point
    raise AssertionError("the function has no end")


def _is_killed(function: Callable[[], object], point: int) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _kill_at(point)
            function()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _kill_at(point: int) -> None:
    left = point

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        makes_a_file = event == "open" and bool((arguments[2] or 0) & os.O_CREAT)
        if event in CHANGES or makes_a_file:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)

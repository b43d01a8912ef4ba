"""Work that is done in a child, and what must be as before afterwards."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmsec.linux import children

DEADLINE_S = 10.0


def run(function: Callable[[], Any], **more: Any) -> Any:
    return children.run_in_child(function, what="working", timeout_s=DEADLINE_S, **more)


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """No zombie, no child, no descriptor."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert set(os.listdir("/proc/self/fd")) == before


def open_descriptors() -> list[int]:
    return sorted(
        int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    )


def fail_with(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail

"""Claims are right again after a crash at any line, and rivals never share a uid."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.unit.uidpool.node import Node, draw
from uidpool.claims import Quarantined, Released, State
from uidpool.ranges import UidRanges
from uidpool.steps import carry_out
from uidpool.usage import Usage

# --- crashes


def killed_at_line(number: int, function: Callable[[], object]) -> bool:
    """Run a function in a child that SIGKILLs itself at its n-th line of the records' code."""
    pid = os.fork()
    if pid == 0:
        left = number

        def on_line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if "/uidpool/" not in frame.f_code.co_filename and (
                "/kvmsec/linux/files" not in frame.f_code.co_filename
            ):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return on_line

        try:
            sys.settrace(on_line)
            function()
            sys.settrace(None)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def crash_at_every_line(
    node: Node, operation: Callable[[], object], check: Callable[[], None]
) -> int:
    number = 1
    while killed_at_line(number, operation):
        check()
        number += 1
    return number


def test_a_draw_killed_at_any_line_loses_no_uid(node: Node) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000-210001")

    def check() -> None:
        for lease in claims.leases():
            claims.release(lease.key)
        everyone = [draw(claims, pool=pool, reuse_delay_s=0) for _ in range(2)]
        assert {lease.uid for lease in everyone} == set(pool)
        assert node.files() == ["210000", "210001"]
        for lease in everyone:
            claims.release(lease.key)

    lines = crash_at_every_line(node, lambda: draw(claims, pool=pool, reuse_delay_s=0), check)
    assert lines > 50


@pytest.mark.parametrize("ends", ["clean", "dirty"])
def test_a_release_killed_at_any_line_never_frees_an_unproved_uid(node: Node, ends: str) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000")
    lease = draw(claims, pool=pool, reuse_delay_s=600)
    if ends == "dirty":
        node.dirty[210000] = Usage(210000, keys=1)

    def check() -> None:
        states = [one.state for one in claims.states()]
        assert states in ([State.LEASED], [State.RESTING], [State.QUARANTINED])
        outcome = claims.release(lease.key)
        assert outcome == (Released() if ends == "clean" else Quarantined("1 keys in the kernel"))
        assert not claims.leases()
        # Unfinished files are removed by whoever changes something next.
        with carry_out(claims._ledger.changing(), claims.take):
            pass
        assert len(node.files()) == 1
        claims._ledger.remove_quarantine(210000)
        node.dirty.clear()
        draw(claims, pool=pool, reuse_delay_s=600)
        if ends == "dirty":
            node.dirty[210000] = Usage(210000, keys=1)

    lines = crash_at_every_line(node, lambda: claims.release(lease.key), check)
    assert lines > 50


# --- rivals


def test_rival_processes_never_hold_the_same_uid(node: Node, tmp_path: Path) -> None:
    """Each marks the uid with a file of its own making while it holds it."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    rivals = [
        context.Process(target=marking_rival, args=(tmp_path, f"r{number}", 40, results))
        for number in range(8)
    ]
    for process in rivals:
        process.start()
    for process in rivals:
        process.join(60)
    assert [process.exitcode for process in rivals] == [0] * 8
    assert [results.get(timeout=10) for _ in rivals] == [0] * 8
    assert node.claims().leases() == ()


def marking_rival(directory: Path, name: str, count: int, results: Any) -> None:
    claims = Node(directory).claims(f"/{name}")
    pool = UidRanges.parse("210000-210009")
    collisions = 0
    for number in range(count):
        lease = claims.draw(pool, instance=name, generation=str(number), reuse_delay_s=0)
        mark = directory / f"held-{lease.uid}"
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            collisions += 1
        os.sched_yield()
        mark.unlink(missing_ok=True)
        claims.release(lease.key)
        claims.release(lease.key)
    results.put(collisions)

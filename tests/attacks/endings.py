"""Encounters over an instance's end: whom a stop ends, and what outlives it."""

import ctypes
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from attrs import frozen

from kvmsec import Node
from kvmsec.linux.children import Child, run_in_child, start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.locks import FileLock
from kvmsec.node import dismantle
from tests.attacks.attack import SUCCEEDED, Encounter, Refusal, in_room
from tests.attacks.attacker import Answer, Instance, Unconfined
from tests.attacks.setting import SOMEBODY
from tests.attacks.stage import DEADLINE_S, Stage, end_all_of, is_ended

_NAME: Final = "forker"
_APART_S: Final = (0.0, 0.02)
"""How much later the second of two that race comes."""
_TRIES: Final = 5
_HELD_S: Final = 0.3
"""Longer than another start takes to come to the lock."""
_PTRACE_SEIZE: Final = 0x4206
_PATIENCE_S: Final = 0.5


def _running(program: Path) -> set[int]:
    """The processes of a program, whoever they are."""
    wanted = program.stat()
    found = set()
    for entry in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):
            if os.path.samestat(entry.stat(), wanted):
                found.add(int(entry.parent.name))
    return found


# Another process with its pid ---------------------------------------------------------------------


@contextmanager
def _bystander(pid: int) -> Iterator[Child]:
    """A process that has the pid of one that was collected, as happens on a node in time."""
    end = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < end, f"nobody got pid {pid}"
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        child = start_child(signal.pause, what="a bystander")
        if child.pid == pid:
            break
        child.close()
    with child:
        yield child


def _pid_reused(stage: Stage, end: Callable[[int], None]) -> Answer:
    """`end` is done to the bystander, and waits for what it ends."""
    pid = int(stage.start("serves").pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with _bystander(pid):
        end(pid)
        return Answer(SUCCEEDED if is_ended(pid) else "SPARED", "a bystander")


def _pid_of_another(stage: Stage) -> Answer:
    return _pid_reused(stage, lambda _: stage.lab.stop("serves"))


def _pid_of_another_by_number(stage: Stage) -> Answer:
    """As by a pidfile: the number is all that is known."""

    def end(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        last = time.monotonic() + DEADLINE_S
        while not is_ended(pid) and time.monotonic() < last:
            time.sleep(0.01)

    answer = _pid_reused(stage, end)
    stage.lab.stop("serves")
    return answer


# What it forked -----------------------------------------------------------------------------------


def _children_left(stage: Stage) -> Answer:
    stage.start("children")
    assert "children: done" in stage.output_of("children")
    program = stage.programs / "qemu"
    before = len(_running(program))
    stage.lab.stop("children")
    left = len(_running(program))
    return Answer(SUCCEEDED if left or before < 20 else "GONE", f"{left} of {before} are left")


def _children_of_a_plain_process_left(stage: Stage) -> Answer:
    with stage.bare("children") as hostile:
        hostile.hear("children: done")
        hostile.process.kill()
        hostile.process.wait(DEADLINE_S)
        left = len(_running(stage.programs / "qemu"))
    return Answer(SUCCEEDED if left else "GONE", f"{left} are left")


# A tracer outside ---------------------------------------------------------------------------------


def _seize(libc: ctypes.CDLL, pid: int) -> int:
    result: int = libc.ptrace(_PTRACE_SEIZE, pid, None, None)
    return result


def _trace(pids: set[int], uid: int) -> int:
    """Have a process of the uid outside the jail trace some: they can't go before it does.

    Returns the tracer's pid.
    """

    def work() -> int:
        reader, writer = os.pipe()
        if (tracer := os.fork()) == 0:
            os.setsid()
            libc = ctypes.CDLL(None, use_errno=True)
            problems = [os.strerror(ctypes.get_errno()) for pid in pids if _seize(libc, pid) < 0]
            os.write(writer, f"{problems}".encode())
            os.closerange(3, 64)
            while True:
                signal.pause()
        assert os.read(reader, 1000) == b"[]"
        return tracer

    who = Credentials(uid, uid)
    return int(run_in_child(work, what="tracing", timeout_s=DEADLINE_S, credentials=who))


@patch.object(dismantle, "KILL_TIMEOUT_S", 0.5)
def _traced_from_outside(stage: Stage) -> Answer:
    info = stage.start("parent", by="taken-over")
    children = _running(stage.programs / "taken-over") - {info.pid}
    tracer = _trace(children, info.uid or 0)
    try:
        stage.lab.stop("parent")
    except dismantle.NotEnded as error:
        os.kill(tracer, signal.SIGKILL)
        stage.lab.stop("parent")
        return Answer(SUCCEEDED, error.message)
    return Answer("GONE" if is_ended(tracer) else "BROKEN", "with its tracer")


def _traced_and_killed(stage: Stage) -> Answer:
    """Who is killed while somebody traces it is still there: that is what holds a stop up."""
    with stage.bare("parent", by="taken-over") as hostile:
        program = stage.programs / "taken-over"
        end = time.monotonic() + DEADLINE_S
        while not (children := _running(program) - {hostile.process.pid}):
            assert time.monotonic() < end, "it forked nobody"
        (child,) = children
        _trace(children, SOMEBODY)
        os.kill(child, signal.SIGKILL)
        hostile.process.kill()
        hostile.process.wait(DEADLINE_S)
        time.sleep(_PATIENCE_S)
        is_there = Path(f"/proc/{child}").exists()
    return Answer(SUCCEEDED if is_there else "GONE", "after it was killed")


# Races --------------------------------------------------------------------------------------------


@frozen
class _Forking:
    """An instance that forks as fast as it can: each of its processes is gone before it is seen."""

    pid: int
    inside: Instance

    def left(self, wrong: list[str]) -> Answer | None:
        """What is wrong once it was ended; None where nothing is."""
        if self.inside.is_gone(_PATIENCE_S) and not wrong:
            return None
        return Answer(SUCCEEDED, f"it forks on, or: {wrong}")


@contextmanager
def _forking(stage: Stage) -> Iterator[_Forking]:
    info = stage.start(_NAME, by=stage.setting.program)
    with Instance(stage.lab.paths.instance(_NAME).serial_socket) as inside:
        assert inside.order("fork-on").is_ready
        yield _Forking(info.pid, inside)


def _stop_while_others_reconcile(stage: Stage) -> Answer:
    async def reconcile_often(node: Any) -> list[str]:
        return [line for _ in range(20) for line in await node.reconcile()]

    for apart_s in _APART_S:
        with _forking(stage) as forking:
            others = [stage.lab.rival(reconcile_often) for _ in range(2)]
            others[0].ends_within(apart_s)
            stage.lab.stop(_NAME)
            # Nobody else takes back what is being stopped.
            done = [line for other in others for line in other.outcome()["value"]]
            if answer := forking.left(done):
                return answer
    return Answer("GONE", "")


def _stop_that_is_killed(stage: Stage) -> Answer:
    """Once before it did anything, and once after it has ended the first of all processes."""
    is_met = False
    for wait_s in (0.0, *[DEADLINE_S] * _TRIES):
        with _forking(stage) as forking:
            was_killed = _kill_a_stop(stage, forking.pid, wait_s)
            if answer := forking.left([]):
                return answer
        if is_met := was_killed and wait_s > 0:
            break
    return Answer("GONE" if is_met else "BROKEN", "a stop was killed at its work")


def _kill_a_stop(stage: Stage, pid: int, wait_s: float) -> bool:
    """Kill who stops an instance once its process has ended, and have another end the rest.

    False where that one was done by then.
    """
    lab, pidfd = stage.lab, os.pidfd_open(pid)
    stopper = lab.rival(lambda node: node.stop(_NAME, force=True))
    select.select([pidfd], [], [], wait_s)
    os.close(pidfd)
    stopper.kill()
    was_killed = stopper.outcome() is None
    # A child that it had just forked holds the lock for some milliseconds more, and reconcile
    # leaves alone what somebody works on.
    with FileLock(lab.paths.instance_lock(_NAME)):
        pass
    lab.reconcile()
    if _NAME in lab.instances():  # It had not come to the first thing that it does.
        lab.stop(_NAME)
    return was_killed


def _stop_and_start_at_once(stage: Stage) -> Answer:
    lab = stage.lab
    for apart_s in _APART_S:
        with _forking(stage) as forking:
            stopper = lab.rival(lambda node: node.stop(_NAME, force=True))
            stopper.ends_within(apart_s)
            starter = _starting(stage, _NAME)
            wrong = [stopper.outcome().get("error"), starter.outcome().get("error")]
            wrong = [one for one in wrong if one not in (None, "AlreadyRunning")]
            # What the first one forked is gone, whoever has its uid now.
            answer = forking.left(wrong)
            if _NAME in lab.instances():
                lab.stop(_NAME)
        if answer:
            return answer
    return Answer("GONE", "")


def _forks_on_when_its_pid_is_killed(stage: Stage) -> Answer:
    """A stop that ends the process which was started, and nothing else."""
    with Unconfined(stage.setting.program, uid=SOMEBODY) as hostile:
        assert hostile.order("fork-on").is_ready
        # From here on only what forks has the line, beside the process that was started.
        assert hostile.go_on().word == SUCCEEDED
        hostile.kill()
        is_gone = hostile.is_gone(_PATIENCE_S)
        end_all_of(SOMEBODY)
    return Answer("GONE" if is_gone else SUCCEEDED, "after it was killed")


def _starting(stage: Stage, name: str, **options: Any) -> Any:
    definition = stage.definition(name)
    return stage.lab.rival(lambda node: node.start(definition), **options)


def _start_at_once(stage: Stage) -> list[str]:
    """Three starts of one name, of which the first is still at it when the others come.

    Returns the errors of those that could not.
    """
    reader, writer = os.pipe()

    def hold(step: str) -> None:
        if step == "images":
            os.write(writer, b"!")
            time.sleep(_HELD_S)

    rivals = [_starting(stage, "serves", on_step=hold)]
    assert os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    rivals += [_starting(stage, "serves") for _ in range(2)]
    outcomes = [rival.outcome() for rival in rivals]
    return [one["error"] for one in outcomes if "error" in one]


def _several_starts(stage: Stage) -> Answer:
    errors = _start_at_once(stage)
    stage.lab.stop("serves")
    return Answer("ALONE" if errors == ["AlreadyRunning"] * 2 else SUCCEEDED, f"{errors}")


def _several_starts_without_lock(stage: Stage) -> Answer:
    @asynccontextmanager
    async def any_turn(_: Node, name: str) -> AsyncIterator[None]:
        yield

    with patch.object(Node, "_turn", any_turn):
        errors = _start_at_once(stage)
    stage.lab.reconcile()
    if "serves" in stage.lab.instances():
        stage.lab.stop("serves")
    return Answer("ALONE" if errors == ["AlreadyRunning"] * 2 else SUCCEEDED, f"{errors}")


_GONE: Final = "GONE"

ENDINGS: Final = in_room(
    "who ends an instance",
    Encounter(
        "pid-of-another",
        Refusal("records", "SPARED"),
        _pid_of_another,
        _pid_of_another_by_number,
    ),
    Encounter(
        "outlive-by-forking",
        Refusal("PID namespace", _GONE),
        _children_left,
        _children_of_a_plain_process_left,
    ),
    Encounter(
        "outlive-by-tracer",
        Refusal("clean before release", _GONE),
        _traced_from_outside,
        _traced_and_killed,
        shared="user|none",
    ),
    *(
        Encounter(
            f"race-{what}",
            Refusal("lock an instance", _GONE),
            meet,
            _forks_on_when_its_pid_is_killed,
        )
        for what, meet in (
            ("stop-with-reconcile", _stop_while_others_reconcile),
            ("stop-with-kill", _stop_that_is_killed),
            ("stop-with-start", _stop_and_start_at_once),
        )
    ),
    Encounter(
        "race-starts",
        Refusal("lock an instance", "ALONE"),
        _several_starts,
        _several_starts_without_lock,
    ),
)

"""Encounters over what an instance answers on: its monitor and its serial line."""

import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kvmsec.errors import StartFailed
from tests.attacks.attack import SUCCEEDED, Encounter, Refusal, in_room
from tests.attacks.attacker import Answer
from tests.attacks.stage import DEADLINE_S, Bare, Memory, Stage

_POLITE_S: Final = 0.2
_READY_S: Final = (0.3, 5.0)
"""The second where a slow machine had not come as far as the monitor in the first."""
_GRACE_S: Final = 4.0
"""For all that a stop does besides waiting, on a machine that is busy."""
_MOST_KIB: Final = 16 * 1024
_REQUESTS: Final = ("qmp_capabilities", "cont", "query-status")
_COMMAND: Final = Path(sys.executable).with_name("kvmsec")
_LEAVE: Final = b"\x1d"  # Ctrl-]
_BELL: Final = b"\a"
_OF_MONITOR: Final = "QEMU's monitor "
"""In what is told where it was the monitor that did not answer, or said too much."""
_SHORTLY_S: Final = 0.5
"""For what is not to come."""


def _judged(began: float, limit_s: float, memory: Memory, said: str) -> Answer:
    took_s = time.monotonic() - began
    if took_s > limit_s + _GRACE_S:
        return Answer(SUCCEEDED, f"held up for {took_s:.1f} s instead of {limit_s} s")
    if memory.grown_kib > _MOST_KIB:
        return Answer(SUCCEEDED, f"fed {memory.grown_kib} KiB")
    return Answer("INTIME", said)


def _stopped(name: str, *, by: str = "qemu") -> Callable[[Stage], Answer]:
    """Start it, and have it powered down: it is to be killed in time, at no cost."""

    def meet(stage: Stage) -> Answer:
        stage.start(name, by=by)
        with Memory() as memory:
            began = time.monotonic()
            reason = stage.lab.stop(name, force=False, timeout_s=_POLITE_S).reason
            answer = _judged(began, _POLITE_S, memory, reason)
        return answer if _OF_MONITOR in reason else Answer("BROKEN", reason)

    return meet


def _started(name: str) -> Callable[[Stage], Answer]:
    """Start what never is ready: that must fail in time, at no cost."""

    def meet(stage: Stage) -> Answer:
        for ready_s in _READY_S:
            with stage.configured(f"[qemu]\nready_timeout_s = {ready_s}\n"), Memory() as memory:
                began = time.monotonic()
                with pytest.raises(StartFailed) as caught:
                    stage.start(name)
                answer = _judged(began, ready_s, memory, caught.value.message)
            if _OF_MONITOR in caught.value.message:
                return answer
        return Answer("BROKEN", caught.value.message)

    return meet


# Somebody who takes no care -----------------------------------------------------------------------


def _listens_to_the_end(behaviour: str, *, call: int) -> Callable[[Stage], Answer]:
    """Reads its monitor for as long as that says something; `call` is the one that floods."""

    def control(stage: Stage) -> Answer:
        heard = 0
        with stage.bare(behaviour) as hostile:
            for _ in range(1, call):
                hostile.call("qmp").close()
            with hostile.call("qmp") as line:
                while heard <= _MOST_KIB * 1024 and (chunk := line.recv(1 << 16)):
                    heard += len(chunk)
        word = SUCCEEDED if heard > _MOST_KIB * 1024 else "BOUNDED"
        return Answer(word, f"{heard} bytes and no end")

    return control


def _waits_for_its_answer(
    behaviour: str, request: str, *, by: str = "qemu", call: int = 1
) -> Callable[[Stage], Answer]:
    """Asks what a start and a stop ask, and would wait for the answer to this request for ever."""

    def control(stage: Stage) -> Answer:
        with stage.bare(behaviour, by=by) as hostile:
            found = [_first_unanswered(hostile) for _ in range(call)]
        is_so = found == [None] * (call - 1) + [request]
        return Answer(SUCCEEDED if is_so else "BROKEN", f"unanswered: {found}")

    return control


def _first_unanswered(hostile: Bare) -> str | None:
    with hostile.call("qmp") as line:
        assert b"QMP" in line.recv(4096)
        for request in _REQUESTS:
            line.sendall(json.dumps({"execute": request, "id": request}).encode())
            line.settimeout(_SHORTLY_S)
            try:
                assert b'"return"' in line.recv(4096)
            except TimeoutError:
                return request
    return None


def _takes_what_is_passed(stage: Stage) -> Answer:
    with stage.bare("passes", by="taken-over") as hostile:
        hostile.call("qmp").close()
        with hostile.call("qmp") as line:
            _, passed, _, _ = socket.recv_fds(line, 4096, 8)
    for descriptor in passed:
        with socket.socket(fileno=descriptor) as connection:
            # Else to close it is to wait for an hour: that is the attack.
            off = struct.pack("ii", 0, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)
    word = SUCCEEDED if passed else "NONE"
    return Answer(word, f"{len(passed)} descriptors")


# A serial line that never drains ------------------------------------------------------------------


def _left_by_console(stage: Stage) -> Answer:
    """Somebody types at a line until no more can be taken, and must be able to leave."""
    stage.start("never-drains")
    near, far = os.openpty()
    os.set_blocking(near, False)
    argv = (_COMMAND, "--root", stage.lab.root, "instance", "console", "never-drains")
    console = subprocess.Popen(argv, stdin=far, stdout=far, stderr=subprocess.PIPE)
    try:
        assert console.stderr
        said = console.stderr.readline()
        assert b"attached" in said, said
        _type_until_it_is_full(near)
        while not _typed(near, _LEAVE):
            select.select([], [near], [], DEADLINE_S)
        console.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        return Answer(SUCCEEDED, "the console can't be left")
    finally:
        console.kill()
        with console:
            os.close(near)
            os.close(far)
        stage.lab.stop("never-drains")
    return Answer("INTIME", f"left with status {console.returncode}")


def _type_until_it_is_full(near: int) -> None:
    """The console rings where it can take no more; meanwhile its terminal may be full, too."""
    end = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < end, "all that was typed was taken"
        _typed(near, b"x" * 2048)
        while select.select([near], [], [], 0)[0]:
            if _BELL in os.read(near, 4096):
                return


def _typed(near: int, keys: bytes) -> bool:
    """Whether the terminal had room for that."""
    try:
        return os.write(near, keys) > 0
    except BlockingIOError:
        return False


def _types_until_all_is_taken(stage: Stage) -> Answer:
    with stage.bare("never-drains") as hostile, hostile.call("serial") as line:
        hostile.hear("held: done")
        line.settimeout(_SHORTLY_S)
        try:
            line.sendall(b"x" * (4 << 20))
        except TimeoutError:
            return Answer(SUCCEEDED, "held up while typing")
    return Answer("TAKEN", "all that was typed")


_BOUNDS: Final = Refusal("bounds", "INTIME")
_DEADLINES: Final = Refusal("deadlines", "INTIME")

CHANNELS: Final = in_room(
    "who talks with an instance",
    Encounter(
        "monitor-flood",
        _BOUNDS,
        _stopped("floods-later"),
        _listens_to_the_end("floods-later", call=2),
    ),
    Encounter(
        "monitor-silence",
        _DEADLINES,
        _stopped("goes-silent"),
        _waits_for_its_answer("goes-silent", "query-status"),
    ),
    Encounter(
        "monitor-flood-at-start",
        _BOUNDS,
        _started("floods"),
        _listens_to_the_end("floods", call=1),
    ),
    Encounter(
        "monitor-line-without-end",
        _BOUNDS,
        _started("one-line"),
        _listens_to_the_end("one-line", call=1),
    ),
    Encounter(
        "monitor-silence-at-start",
        _DEADLINES,
        _started("greets-only"),
        _waits_for_its_answer("greets-only", "qmp_capabilities"),
    ),
    Encounter(
        "monitor-mute-at-stop",
        _DEADLINES,
        _stopped("mute", by="taken-over"),
        _waits_for_its_answer("mute", "cont", by="taken-over", call=2),
    ),
    Encounter(
        "monitor-passes-descriptors",
        Refusal("bounds", "INTIME"),
        _stopped("passes", by="taken-over"),
        _takes_what_is_passed,
        locks=frozenset({"everything", "no seccomp"}),
    ),
    Encounter("serial-never-drained", _DEADLINES, _left_by_console, _types_until_all_is_taken),
)

"""Encounters over what an instance writes, and what lies where a launcher reads and opens."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hypervisor.images.errors import ImageNotOpened
from kvmsec.linux.children import start_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from tests.attacks.attack import SUCCEEDED, Encounter, Refusal, in_room
from tests.attacks.attacker import Answer
from tests.attacks.stage import Stage
from tests.kvm.serial_line import Line

_SECRET: Final = "root:"
"""How a line of /etc/shadow begins."""
_SOMEWHAT_BYTES: Final = 1 << 20
_SLACK_BYTES: Final = 256 * 1024
_GIANT_BYTES: Final = 1 << 40
"""As stand_in.c has it."""
_PLANTED: Final[dict[str, Callable[[Path], bool]]] = {
    "links": Path.is_symlink,
    "fifos": Path.is_fifo,
    "directories": Path.is_dir,
    "sockets": Path.is_socket,
    "giant": lambda path: path.stat().st_size == _GIANT_BYTES,
}
_SERIAL_KIB: Final = 16
_ROOM_KIB: Final = _SERIAL_KIB + 64
"""Of its place: what the serial line may take, and what is QEMU's own (docs/configuration.md)."""
_FLOOD_LINES: Final = 1200
_PATIENCE_S: Final = 0.5


# Its log ------------------------------------------------------------------------------------------


def _log_read(behaviour: str) -> Callable[[Stage], Answer]:
    """Read its log while it runs, and what is kept of it when it is stopped."""

    def meet(stage: Stage) -> Answer:
        with _planting(stage, behaviour):
            shown = stage.output_of(behaviour)
        kept = stage.lab.paths.instance_output(behaviour)
        if len(shown) > 2 * _SOMEWHAT_BYTES or kept.stat().st_size > 2 * _SOMEWHAT_BYTES:
            return Answer(SUCCEEDED, f"{len(shown)} shown, {kept.stat().st_size} kept")
        if _SECRET in shown or _SECRET in kept.read_text(errors="replace"):
            return Answer(SUCCEEDED, "what only root can read is shown or kept")
        return Answer("UNREAD", f"{len(shown)} bytes shown")

    return meet


def _log_read_without_care(behaviour: str, outcome: str) -> Callable[[Stage], Answer]:
    """`outcome` is what must come of it: what only root can read, a size, or the reader's end."""

    def control(stage: Stage) -> Answer:
        with _planting(stage, behaviour):
            found = _read_without_care(stage.lab.paths.instance(behaviour).output / "qemu.log")
        return Answer(SUCCEEDED if outcome in found else "BROKEN", found)

    return control


def _read_without_care(path: Path) -> str:
    """What comes of following links, waiting for a FIFO, and taking any size for a log's."""

    def read() -> str:
        size = path.stat().st_size
        if size > _SOMEWHAT_BYTES:
            return f"{size} bytes"
        return path.read_text(errors="replace")

    child = start_child(read, what="reading without care")
    try:
        return str(child.collect(_PATIENCE_S))
    except (ChildTimedOut, ChildFailed) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _planting(stage: Stage, behaviour: str) -> Iterator[None]:
    """An instance that has put something into its log's place.

    It may write files as large as its disk is: without one there is no giant.
    """
    disk = stage.lab.disk(f"{behaviour}.raw")
    os.truncate(disk, _GIANT_BYTES)
    stage.start(behaviour, disks=[{"path": str(disk)}])
    try:
        planted = stage.lab.paths.instance(behaviour).output / "qemu.log"
        assert _PLANTED[behaviour](planted), "nothing was planted"
        yield
    finally:
        stage.lab.stop(behaviour)
        disk.unlink()


# Room ---------------------------------------------------------------------------------------------


def _bytes_below(top: Path, apart: Path) -> int:
    """Of all files on the node's side, whose own place is apart."""
    files = (file for file in top.rglob("*") if apart not in file.parents)
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def _filled(stage: Stage) -> Answer:
    own = stage.lab.paths.instance("fills").output
    before = _bytes_below(stage.lab.root, own)
    stage.start("fills")
    taken = _bytes_below(stage.lab.root, own) - before
    left = os.statvfs(own).f_bfree
    stage.lab.stop("fills")
    if taken > _SLACK_BYTES:
        return Answer(SUCCEEDED, f"took {taken} bytes of the node's")
    # That its own place is full shows that it tried.
    return Answer("BOUNDED" if left == 0 else "BROKEN", f"{left} blocks left of its own")


def _fills_a_plain_file(stage: Stage) -> Answer:
    log = stage.setting.scratch / "log"
    with log.open("wb") as output, stage.bare("fills", output=output) as hostile:
        try:
            hostile.process.wait(20)
        except subprocess.TimeoutExpired:
            return Answer("BROKEN", "it came to no end")
    size = log.stat().st_size
    log.unlink()
    return Answer(SUCCEEDED if size > _SLACK_BYTES else "BOUNDED", f"{size} bytes")


def _flood_of_a_guest(stage: Stage, log_kib: int) -> tuple[int, int]:
    """Bytes of the room that a real guest's serial log has, and of the log after a flood."""
    with stage.configured(f"[limits]\nlog_kib = {log_kib}\n"):
        stage.lab.start("talker", **stage.security)
    with Line(stage.lab.paths.instance("talker").serial_socket) as line:
        line.say(b"f")
        # Not each of them whole: QEMU's serial port drops what can't be taken as fast as it comes.
        seen = sum("FLOOD" in line.hear_line() for _ in range(_FLOOD_LINES))
        output = stage.lab.paths.instance("talker").output
        room = os.statvfs(output)
        size = (output / "serial.log").stat().st_size
    stage.lab.stop("talker")
    assert seen > _FLOOD_LINES * 0.8
    return room.f_blocks * room.f_frsize, size


def _serial_flooded(stage: Stage) -> Answer:
    room, size = _flood_of_a_guest(stage, _SERIAL_KIB)
    is_bounded = room <= _ROOM_KIB * 1024 and size <= _SERIAL_KIB * 1024
    return Answer("BOUNDED" if is_bounded else SUCCEEDED, f"{size} of {room} bytes")


def _serial_flooded_in_a_larger_place(stage: Stage) -> Answer:
    """The same flood where sixty times as much has room: the bound is what held it."""
    _, size = _flood_of_a_guest(stage, _SERIAL_KIB * 64)
    return Answer(SUCCEEDED if size > _SERIAL_KIB * 1024 else "BOUNDED", f"{size} bytes")


# Its disk -----------------------------------------------------------------------------------------


def _swapped(disk: Path) -> None:
    disk.unlink()
    disk.symlink_to("/etc/shadow")


def _disk_opened(stage: Stage) -> Answer:
    """The definition was made, and judged, while a plain file was there."""
    disk = stage.lab.disk("swapped.raw")
    definition = stage.lab.definition("swapped", disks=[{"path": str(disk)}], **stage.security)

    def swap(step: str) -> None:
        if step == "images":
            _swapped(disk)

    async def start(node: Any) -> Any:
        return await node.start(definition)

    try:
        stage.lab.run(start, on_step=swap)
    except ImageNotOpened as error:
        return Answer("UNREAD", error.message)
    finally:
        disk.unlink()
    stage.lab.stop("swapped")
    return Answer(SUCCEEDED, "it got what the link led to")


def _disk_opened_without_care(stage: Stage) -> Answer:
    disk = stage.lab.disk("swapped.raw")
    _swapped(disk)
    try:
        found = _read_without_care(disk)
    finally:
        disk.unlink()
    return Answer(SUCCEEDED if _SECRET in found else "BROKEN", found)


_UNREAD: Final = Refusal("opened without links", "UNREAD")
_BOUNDED: Final = Refusal("sized tmpfs", "BOUNDED")

OUTPUTS: Final = in_room(
    "who reads and keeps what it writes",
    *(
        Encounter(
            f"log-as-{what}",
            _UNREAD,
            _log_read(behaviour),
            _log_read_without_care(behaviour, outcome),
        )
        for what, behaviour, outcome in (
            ("link", "links", _SECRET),
            ("fifo", "fifos", "ChildTimedOut"),
            ("directory", "directories", "[Errno 21]"),  # EISDIR
            ("socket", "sockets", "[Errno 6]"),  # ENXIO
            ("giant", "giant", f"{_GIANT_BYTES} bytes"),
        )
    ),
    Encounter("disk-as-link", _UNREAD, _disk_opened, _disk_opened_without_care),
    Encounter("log-fill", _BOUNDED, _filled, _fills_a_plain_file),
    Encounter("serial-flood", _BOUNDED, _serial_flooded, _serial_flooded_in_a_larger_place),
)

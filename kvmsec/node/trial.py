"""A guest that is booted only to see whether this host runs guests.

Nothing of it outlives the call, however that ends: the guest and whoever looks after it live in a
PID namespace whose first process is killed with the caller, and all their files on a tmpfs in a
mount namespace of their own. The guest has the same jail as an instance, as nobody, without a
control group.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, NoReturn

from hypervisor import cmdline, process, tiny
from hypervisor.closure import Closure
from hypervisor.features import Features
from hypervisor.foreign_text import escaped
from hypervisor.jail import BootFile, Cell, Jail
from hypervisor.machine import Machine
from hypervisor.monitor import Monitor
from hypervisor.newborn import Newborn, spawn
from hypervisor.seccomp import Filter, NoFilter, find_filter
from hypervisor.tree import BOOT, build_tree
from kvmsec.errors import KvmsecError
from kvmsec.linux import namespaces, syscalls, unix_sockets
from kvmsec.linux.children import Child, close_all_but
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, Fault
from kvmsec.linux.forking import fork_init
from kvmsec.node import output
from kvmsec.node.waiting import readable

NOBODY: Final = Credentials(65534, 65534)  # Debian Policy 9.2.2
_PLACE: Final = Path("/run")  # a directory that is everywhere, and that QEMU is not started from
_FIRMWARE: Final = PurePosixPath(BOOT) / "firmware"
_QMP, _SERIAL = 3, 4
_GRACE_S: Final = 1.0
_WORDS_CHARS: Final = 300


class TrialFailed(KvmsecError):
    """The guest did not boot; the message says what was seen, with QEMU's own words."""


def boot_tiny_guest(
    closure: Closure,
    features: Features,
    accelerator: Literal["kvm", "tcg"],
    *,
    timeout_s: float,
) -> float:
    """Boot the tiny guest in a jail and wait for its banner; returns the seconds that it took.

    Needs root and one thread. Raises TrialFailed.
    """

    child = _start_init(
        lambda: asyncio.run(_boot(closure, features, accelerator, timeout_s)),
        what=f"booting the tiny guest under {accelerator}",
    )
    try:
        told = child.collect(timeout_s + _GRACE_S)
    except (ChildFailed, ChildTimedOut) as failure:
        raise TrialFailed(failure.message) from failure
    if problem := told["problem"]:
        raise TrialFailed(str(problem))
    return float(told["took_s"])


def _start_init(function: Callable[[], object], *, what: str) -> Child:
    """Fork the first process of a PID namespace; all others in it end when that does."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = fork_init()
        if pid == 0:
            _be_init(function, writer)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return Child(pid, pidfd, reader, what)


def _be_init(function: Callable[[], object], writer: int) -> NoReturn:
    """The child's whole life; it must never return into the parent's code."""
    status = 1
    try:
        syscalls.end_with_parent()
        close_all_but({0, 1, 2, writer})
        answer: dict[str, object]
        try:
            _leave_the_host()
            answer = {"value": function()}
        except (Fault, OSError) as failure:
            answer = {"kind": type(failure).__name__, "detail": str(failure)}
        os.write(writer, json.dumps(answer).encode())
        status = 0
    finally:
        os._exit(status)


def _leave_the_host() -> None:
    """Take places of our own: a /proc that shows our PID namespace, and a tmpfs to work on."""
    syscalls.unshare(namespaces.CLONE_NEWNS)
    namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    namespaces.mount("proc", "/proc", "proc", flags)
    namespaces.mount("kvmsec-trial", str(_PLACE), "tmpfs", flags, "size=1m,mode=0700")


async def _boot(
    closure: Closure, features: Features, accelerator: Literal["kvm", "tcg"], timeout_s: float
) -> dict[str, Any]:
    """What there is to tell: `took_s` until the banner, or the `problem`."""
    started = time.monotonic()
    machine = Machine(name="doctor", memory_mib=1, firmware=tiny.rom_path())
    grants = cmdline.Grants(qmp=_QMP, serial=_SERIAL, firmware=_FIRMWARE)
    argv = cmdline.build(machine, features, grants, accelerator=accelerator)
    with ExitStack() as opened:
        problem = None
        try:
            jail, listeners = _make_jail(closure, accelerator, opened)
            newborn = spawn(jail, closure.program, (closure.program, *argv))
            opened.callback(process.kill_and_wait, newborn.pidfd, _GRACE_S)
            async with asyncio.timeout(timeout_s):
                newborn.release()
                await readable(newborn.fileno(), None)
                newborn.executed()
                for listener in listeners:
                    listener.close()
                problem = await _hear(newborn)
        except TimeoutError:
            problem = f"it did not speak within {timeout_s:g} s"
        except Fault as failure:
            problem = failure.message
        took_s = time.monotonic() - started
        if problem is not None and (words := _last_words()):
            problem = f"{problem}; QEMU said: {words}"
    return {"took_s": took_s, "problem": problem}


def _make_jail(
    closure: Closure, accelerator: str, opened: ExitStack
) -> tuple[Jail, tuple[socket.socket, ...]]:
    rom = os.open(tiny.rom_path(), os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, rom)
    (_PLACE / "output").mkdir(mode=0o700)
    log = output.mount(_PLACE / "output", NOBODY, size_kib=64)
    opened.callback(os.close, log)
    room = syscalls.detached_copy(str(_PLACE / "output"))
    opened.callback(os.close, room)
    tree = build_tree(closure, str(_PLACE))
    opened.callback(os.close, tree)
    qmp = opened.enter_context(unix_sockets.listen(_PLACE / "qmp"))
    serial = opened.enter_context(unix_sockets.listen(_PLACE / "serial"))
    jail = Jail(
        Cell(tree),
        name="doctor",
        credentials=NOBODY,
        output=room,
        log=log,
        system_calls=_filter(),
        boot_files=(BootFile(rom, os.fstat(rom).st_size, _FIRMWARE.name),),
        has_kvm=accelerator == "kvm",
        descriptors={_QMP: qmp.fileno(), _SERIAL: serial.fileno()},
    )
    return jail, (qmp, serial)


def _filter() -> Filter | None:
    """As an instance's, where there can be one: a check of its own says where there can't."""
    try:
        return find_filter()
    except NoFilter:
        return None


async def _hear(newborn: Newborn) -> str | None:
    """Let the guest run once its confinement was seen; None when its banner came."""
    async with await Monitor.connect(_PLACE / "qmp") as monitor:
        if problems := process.confinement_problems(newborn):
            return f"QEMU is not confined: {'; '.join(problems)}"
        with unix_sockets.connect(_PLACE / "serial") as line:
            await monitor.cont()
            return await _read_banner(line)


async def _read_banner(line: socket.socket) -> str | None:
    heard = b""
    while not heard.startswith(tiny.BANNER):
        chunk = await asyncio.get_running_loop().sock_recv(line, 256)
        if not chunk:
            return "QEMU ended before its guest spoke"
        heard += chunk
        if not tiny.BANNER.startswith(heard[: len(tiny.BANNER)]):
            return f"it spoke otherwise than expected: {escaped(heard, limit_chars=80)}"
    return None


def _last_words() -> str:
    words = output.read(_PLACE / "output", output.QEMU_LOG, 1 << 16)
    return escaped(words.strip(), limit_chars=_WORDS_CHARS)

"""The first process of a node: makes its places private, runs what it is asked to, reaps.

It takes its orders from the test over a socket, and ends when that is closed; the kernel then ends
every other process of the node. Its own namespaces were made by unshare(1).
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

MESSAGE_BYTES: Final = 1 << 16
_FRESH: Final = {"/run": "755", "/tmp": "1777", "/dev/shm": "1777"}
"""Empty after each boot."""
_KEPT: Final = ("/etc", "/var/lib", "/var/log", "/var/tmp")
"""On the node's disk."""
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    boot = json.loads(channel.recv(MESSAGE_BYTES))
    try:
        _furnish(Path(boot["disk"]), boot["shown"])
        socket.sethostname(boot["name"])
        _tell(channel, {})
    except BaseException as error:
        _tell(channel, {"error": f"{type(error).__name__}: {error}"})
        raise
    _Reaper(channel).serve()


def _tell(channel: socket.socket, answer: dict[str, Any]) -> None:
    channel.send(json.dumps(answer).encode())


def _furnish(disk: Path, shown: list[str]) -> None:
    """Give the node its disk, an empty /run and its own /proc; `shown` stays where it was."""
    from kvmsec.linux import namespaces

    def bind(source: int, target: str) -> None:
        namespaces.mount(f"/proc/self/fd/{source}", target, None, namespaces.MS_BIND)

    # Held by descriptors: where they lie is about to be hidden.
    kept = {place: os.open(f"{disk}{place}", os.O_PATH) for place in _KEPT}
    shown_again = {place: os.open(place, os.O_PATH) for place in shown}
    boot_id = os.open(disk / "boot_id", os.O_PATH)
    for place, mode in _FRESH.items():
        namespaces.mount("node", place, "tmpfs", 0, f"mode={mode}")
    os.mkdir("/run/lock")
    os.chmod("/run/lock", 0o1777)
    for place, descriptor in kept.items():
        bind(descriptor, place)
    for place, descriptor in shown_again.items():
        if not os.path.exists(place):
            os.makedirs(place)
            bind(descriptor, place)
    if os.path.ismount("/dev/mqueue"):
        namespaces.mount("mqueue", "/dev/mqueue", "mqueue", 0)
    # The host has not been booted anew, and the node has.
    bind(boot_id, _BOOT_ID)
    for descriptor in (*kept.values(), *shown_again.values(), boot_id):
        os.close(descriptor)


class _Reaper:
    """Runs programs, and tells of each that was asked for how it ended."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._told_to: dict[int, int] = {}
        """Where the exit status of a process is written to."""

    def serve(self) -> None:
        ended, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([self._channel, ended], [], [])
            if ended in ready:
                os.read(ended, MESSAGE_BYTES)
                self._reap()
            if self._channel in ready and not self._take():
                return

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self._report(*found)

    def _report(self, pid: int, status: int) -> None:
        if (pipe := self._told_to.pop(pid, None)) is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)

    def _take(self) -> bool:
        """Do one thing that the test asks for; False once there is no test any more."""
        message, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 4)
        if not message:
            return False
        order = json.loads(message)
        try:
            answer = getattr(self, f"do_{order.pop('do')}")(descriptors, **order)
            _tell(self._channel, answer or {})
        except OSError as error:
            _tell(self._channel, {"error": str(error), "errno": error.errno})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def do_spawn(
        self, descriptors: list[int], argv: list[str], env: dict[str, str]
    ) -> dict[str, Any]:
        """Start a program in a session of its own: input, output, errors, and where to tell."""
        actions = [(os.POSIX_SPAWN_DUP2, descriptors[place], place) for place in range(3)]
        # What an exec hands down as ignored stays so: this process ignores what Python does.
        heard = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT]
        pid = os.posix_spawnp(
            argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=heard
        )
        self._told_to[pid] = os.dup(descriptors[3])
        return {"pid": pid}

    def do_signal(self, _: list[int], pid: int, number: int, session: bool) -> None:
        """Signal a process that was started here, or all of its session, if it still runs."""
        if pid in self._told_to:
            (os.killpg if session else os.kill)(pid, number)

    def do_signal_all(self, _: list[int], number: int) -> None:
        """Signal every process of the node, in one step (kill(2), -1): all but this one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)


if __name__ == "__main__":
    main()

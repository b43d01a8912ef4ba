"""Talking to the stand-in that attacks: see main.c."""

import os
import select
import socket
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, Self

from attrs import frozen

from kvmsec.linux import unix_sockets

_DEADLINE_S: Final = 30.0
_BUILD: Final = Path(__file__).with_name("build")
_BUILT: Final = Path(__file__).resolve().parents[2] / ".venv/attacks"


def program() -> Path:
    """The stand-in; built anew when one of its sources is newer."""
    done = subprocess.run([_BUILD, _BUILT], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


@frozen
class Answer:
    """What an attack came to: `succeeded`, the name of the kernel's error, or a word of its own."""

    word: str
    found: str

    @property
    def is_ready(self) -> bool:
        return self.word == "ready"


class Attacker:
    """A process that takes orders over a pair of descriptors."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._heard = b""

    def order(self, text: str) -> Answer:
        """Have an attack carried out; an answer `ready` wants to be followed by `go_on`."""
        return self._say(text)

    def go_on(self) -> Answer:
        return self._say("go")

    def is_gone(self, within_s: float) -> bool:
        """Whether nobody has its end of the line any more, nor any process that it forked."""
        if not select.select([self._reader], [], [], within_s)[0]:
            return False
        try:
            return os.read(self._reader, 4096) == b""
        except ConnectionResetError:
            return True

    def _say(self, text: str) -> Answer:
        try:
            os.write(self._writer, text.encode() + b"\n")
            line = self._hear_line()
        except (BrokenPipeError, ConnectionResetError):
            return Answer("ENDED", "the whole instance")
        if line is None:
            return Answer("ENDED", "the whole instance")
        _, word, found = line.split(" ", 2)
        return Answer(word, found)

    def _hear_line(self) -> str | None:
        end = time.monotonic() + _DEADLINE_S
        while b"\n" not in self._heard:
            wait_s = max(0.0, end - time.monotonic())
            assert select.select([self._reader], [], [], wait_s)[0], "the attacker says nothing"
            chunk = os.read(self._reader, 4096)
            if not chunk:
                return None
            self._heard += chunk
        line, self._heard = self._heard.split(b"\n", 1)
        return line.decode(errors="backslashreplace")


class Instance(Attacker):
    """The stand-in as an instance, by its serial line."""

    def __init__(self, serial_socket: Path) -> None:
        self._line: socket.socket = unix_sockets.connect(serial_socket)
        self._line.setblocking(True)
        super().__init__(self._line.fileno(), self._line.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()


class Unconfined(Attacker):
    """The stand-in as a plain process of a uid (None: the caller's), with what it is given.

    `root` is a directory that it takes for its root, while its working directory stays outside.
    What it mounts is its own, so that its end takes that back.
    """

    def __init__(
        self,
        program: Path,
        *,
        uid: int | None = None,
        root: Path | None = None,
        give: Collection[int] = (),
    ) -> None:
        ids = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        self._process = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *(() if uid is None else ("setpriv", *ids)),
                *(program, "--control", *([root] if root else [])),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(give),
            cwd="/",
        )
        assert self._process.stdin and self._process.stdout
        super().__init__(self._process.stdout.fileno(), self._process.stdin.fileno())

    def __enter__(self) -> Self:
        return self

    def kill(self) -> None:
        """End the process that was started, and no other."""
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()
        with self._process:
            pass

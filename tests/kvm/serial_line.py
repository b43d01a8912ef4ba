"""The serial line of a guest."""

import contextlib
import select
import socket
import time
from pathlib import Path

from kvmsec.linux import unix_sockets

DEADLINE_S = 60.0


class Lines:
    """What a guest says over a socket, line by line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._heard = b""

    def say(self, data: bytes) -> None:
        self._socket.settimeout(DEADLINE_S)
        self._socket.sendall(data)

    def hear_line(self, within_s: float = DEADLINE_S) -> str:
        """The next line, without its end. Raises TimeoutError."""
        end = time.monotonic() + within_s
        while b"\r\n" not in self._heard:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            chunk = self._socket.recv(65536)
            assert chunk, f"the line was closed after {self._heard!r}"
            self._heard += chunk
        line, self._heard = self._heard.split(b"\r\n", 1)
        return line.decode("latin-1")

    def ask(self, command: bytes) -> str:
        self.say(command)
        return self.hear_line()

    def is_silent(self, for_s: float) -> bool:
        return not self._heard and not select.select([self._socket], [], [], for_s)[0]

    def close(self) -> None:
        self._socket.close()


class Line(Lines):
    """The serial line of a tiny guest, as `console` has it; see vm-images/tiny/README.md."""

    def __init__(self, path: Path) -> None:
        super().__init__(unix_sockets.connect(path))
        self._agree()

    def _agree(self) -> None:
        """Have the guest's attention: what is said before its banner may be lost.

        Should only the end of the question arrive, `z` is no command and does nothing.
        """
        for length in range(1, 200):
            word = "z" * length
            self.say(f"e{word}\n".encode())
            with contextlib.suppress(TimeoutError):
                while self.hear_line(0.2) != f"ECHO {word}":
                    continue
                return
        raise AssertionError("the guest does not answer")

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

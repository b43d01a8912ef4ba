"""Asking a program about itself: as somebody who can do nothing, for a short time, in few words.

The program may be broken or hostile: it gets no network, no group, no capability, no descriptor
but its three, and is ended with all that it started when the time is over or it talks too much.
"""

import base64
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Final

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.command import ENVIRONMENT
from kvmsec.linux.credentials import Credentials, become

OUTPUT_LIMIT_BYTES: Final = 512 * 1024
"""For both streams together, and a last chunk; in base64 that fits a child's answer of 1 MiB."""
_GRACE_S: Final = 2.0
_CHUNK_BYTES: Final = 1 << 16


@frozen
class Answer:
    """What a program said; status is negative for a signal, and None where it had to be ended."""

    status: int | None
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """What it had to say for itself, as one short line."""
        return escaped((self.stderr or self.stdout).strip(), limit_chars=500)


def inquire(
    argv: Sequence[str],
    *,
    credentials: Credentials | None,
    timeout_s: float,
    input: bytes = b"",  # noqa: A002  (the name that subprocess gave it)
) -> Answer:
    """Run a program with `input` for at most `timeout_s` seconds and return what it said.

    With credentials (which takes root) it runs as these in namespaces of its own; without, as the
    caller. Raises ChildFailed where it can't be started (its `kind` names the exception).
    """

    def ask() -> dict[str, object]:
        if credentials is not None:
            _leave_the_host(credentials)
        return _converse(argv, input, timeout_s)

    told = run_in_child(ask, what=f"asking {argv[0]}", timeout_s=timeout_s + _GRACE_S)
    return Answer(
        status=told["status"],
        stdout=base64.b64decode(told["stdout"]),
        stderr=base64.b64decode(told["stderr"]),
    )


def _leave_the_host(credentials: Credentials) -> None:
    # The PID namespace is for what is forked next: when that ends, so does all below it.
    syscalls.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWPID)
    become(credentials)


def _converse(argv: Sequence[str], question: bytes, timeout_s: float) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with subprocess.Popen(
        list(argv),
        stdin=_asked(question),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = _listen(process, deadline)
        finally:
            is_ended = process.poll() is None
            if is_ended:
                # The whole group, for a caller without a PID namespace for the program.
                os.killpg(process.pid, signal.SIGKILL)
    return {
        "status": None if is_ended else process.returncode,
        "stdout": base64.b64encode(stdout).decode(),
        "stderr": base64.b64encode(stderr).decode(),
    }


def _asked(question: bytes) -> int:
    """The reading end of a pipe that holds the whole question, so that nobody has to feed it."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        if os.write(writer, question) != len(question):
            raise ValueError(f"a question of {len(question)} bytes does not fit a pipe")
    finally:
        os.close(writer)
    return reader


def _listen(process: "subprocess.Popen[bytes]", deadline: float) -> tuple[bytearray, bytearray]:
    """Take what the program says until it ends, talks too much or the time is over."""
    assert process.stdout and process.stderr  # both are pipes
    said = (bytearray(), bytearray())
    with selectors.DefaultSelector() as selector:
        for stream, words in zip((process.stdout, process.stderr), said, strict=True):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, words)
        pidfd = os.pidfd_open(process.pid)
        try:
            selector.register(pidfd, selectors.EVENT_READ)
            while (remaining := deadline - time.monotonic()) > 0:
                ready = [key for key, _ in selector.select(remaining)]
                for key in ready:
                    if key.fd != pidfd and not _take(key.fd, key.data):
                        selector.unregister(key.fileobj)
                is_over = sum(map(len, said)) > OUTPUT_LIMIT_BYTES
                # Its last words are read before its end is looked at: another turn finds no more.
                if is_over or [key.fd for key in ready] == [pidfd]:
                    break
        finally:
            os.close(pidfd)
    return said


def _take(descriptor: int, words: bytearray) -> bool:
    """Add what can be read at once; False at the stream's end."""
    try:
        chunk = os.read(descriptor, _CHUNK_BYTES)
    except BlockingIOError:
        return True
    words += chunk
    return bool(chunk)

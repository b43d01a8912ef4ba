"""The one door to other programs: a clean environment, no input but what is given, a deadline."""

import contextlib
import signal
import subprocess
from collections.abc import Container, Iterator, Sequence
from typing import Final

from attrs import frozen

from kvmsec.linux.errors import CommandFailed, CommandTimedOut

ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


@frozen
class Output:
    """What a command left: its exit status (negative: the signal that ended it) and its words."""

    status: int
    stdout: bytes
    stderr: bytes


def run(
    argv: Sequence[str],
    *,
    input: bytes = b"",  # noqa: A002  (the name that subprocess gave it)
    timeout_s: float,
    ok: Container[int] = (0,),
) -> Output:
    """Run a program to its end and return what it said.

    Raises CommandFailed for a status outside `ok`, CommandTimedOut past `timeout_s` seconds (the
    program is killed) and FileNotFoundError where there is no such program.
    """
    try:
        with _statuses_kept():
            done = subprocess.run(
                list(argv),
                input=input,
                capture_output=True,
                env=ENVIRONMENT,
                cwd="/",
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise CommandTimedOut(argv, timeout_s) from error
    if done.returncode not in ok:
        raise CommandFailed(argv, done.returncode, done.stderr)
    return Output(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def _statuses_kept() -> Iterator[None]:
    """Within it the kernel keeps exit statuses, whatever the calling program does about SIGCHLD.

    Ignored (an `exec` hands that down too), they are thrown away, and `subprocess` takes a status
    that nobody knows for 0.
    """
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

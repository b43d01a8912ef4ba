"""kvmsec's own log of an instance: what was done to it, in lines that the instance never holds."""

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from hypervisor.foreign_text import escaped
from kvmsec.linux.files import read_bounded

_LIMIT_BYTES: Final = 1 << 20
_LINE_LIMIT: Final = 64 * 1024


def note(path: Path, text: str) -> None:
    """Append a line with the time (UTC); the log before goes to PATH.1 once it holds 1 MiB.

    What does not print is escaped, so that foreign words can't forge a line. A full disk loses
    lines, and nothing else: a stop or an undo goes on.
    """
    shown = escaped(text, limit_chars=_LINE_LIMIT)
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    with contextlib.suppress(OSError):
        _append(path, f"{stamp} {shown}\n".encode())


def _append(path: Path, line: bytes) -> None:
    create = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, create, 0o600)
    try:
        is_full = os.fstat(descriptor).st_size >= _LIMIT_BYTES
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if is_full:
        path.rename(path.with_name(path.name + ".1"))


def read(path: Path) -> str:
    """The log's lines; empty when there are none. Raises OSError."""
    try:
        return read_bounded(path, 2 * _LIMIT_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""

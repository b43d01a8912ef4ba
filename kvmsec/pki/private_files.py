"""Files that only their owner may read: read when nobody else could have, replaced whole."""

import os
import stat
from pathlib import Path
from typing import Final

from kvmsec.errors import NotRoot
from kvmsec.linux.files import read_bounded, write_atomically
from kvmsec.pki.errors import KeyFileRefused

LIMIT_BYTES: Final = 1 << 20


def read_private(path: Path, *, hint: str, limit_bytes: int = LIMIT_BYTES) -> str | None:
    """The text of a file, or None where there is none.

    Raises KeyFileRefused, with `hint` where another copy is what helps, for a link of either kind,
    for one that is not the caller's or that others may read or write, and for a directory that
    others may write; NotRoot where it may not be read.
    """
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise NotRoot(f"reading {path}") from error
    try:
        _require_closed_directory(path.parent, os.fstat(directory))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise NotRoot(f"reading {path}") from error
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"can't be read: {error.strerror}"
        raise KeyFileRefused(path, reason, hint=hint) from error
    finally:
        os.close(directory)
    try:
        _require_private(path, os.fstat(descriptor), hint)
        return read_bounded(descriptor, limit_bytes).decode("utf-8")
    except ValueError:
        raise KeyFileRefused(path, "is too large, or no text", hint=hint) from None
    finally:
        os.close(descriptor)


def write_private(path: Path, text: str) -> None:
    """Replace a file whole, 0600; a link in its place is replaced, not followed.

    Raises KeyFileRefused (the old content stands) and NotRoot.
    """
    try:
        write_atomically(path, text.encode())
    except PermissionError as error:
        raise NotRoot(f"changing {path}") from error
    except OSError as error:
        hint = "the old file stands; make room or mend the file system, then run it again"
        raise KeyFileRefused(path, f"can't be written: {error.strerror}", hint=hint) from error


def _require_closed_directory(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileRefused(
            path, "can be changed by others", hint=f"chown root {path}; chmod 0700 {path}"
        )


def _require_private(path: Path, status: os.stat_result, hint: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileRefused(path, "is no regular file", hint=hint)
    if status.st_nlink != 1:
        raise KeyFileRefused(path, f"has {status.st_nlink} names (hard links)", hint=hint)
    if status.st_uid != os.geteuid():
        raise KeyFileRefused(
            path, f"belongs to uid {status.st_uid}", hint=f"{hint}; don't trust what it holds"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~0o600:
        raise KeyFileRefused(
            path,
            f"is open to others (mode {mode:04o})",
            hint=f"chmod 0600 {path}; where others could have read a key, renew it with "
            "`kvmsec cluster renew-crypto`",
        )

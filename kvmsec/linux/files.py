"""Files that must be whole or absent, and paths that nobody else may steer."""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from kvmsec.linux import syscalls
from kvmsec.linux.errors import UntrustedPath

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}", re.ASCII)  # What `_write_temporary` makes.

_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_MAX_LINKS: Final = 40  # The kernel's own bound, path_resolution(7).


def replace_atomically(path: Path, data: bytes) -> None:
    """Put `data` in place of whatever `path` holds, so that a reader sees the old or the new.

    The file is the caller's alone, 0600. Not synced: for what means nothing after a power cut.
    Raises OSError (the old content is then untouched and no temporary file is left).
    """
    temporary, descriptor = _write_temporary(path, data)
    os.close(descriptor)
    _rename(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Like `replace_atomically`, and a power cut leaves the old or the new as well.

    Synced before and after the rename.
    """
    temporary, descriptor = _write_temporary(path, data)
    try:
        os.fsync(descriptor)
    except BaseException:
        remove_file(temporary)
        raise
    finally:
        os.close(descriptor)
    _rename(temporary, path)
    _sync_directory(path.parent)


def _rename(temporary: str, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise


def create_exclusively(path: Path, data: bytes) -> None:
    """Create `path` with `data`, complete from the moment it can be seen.

    Raises FileExistsError when it is there already, and OSError (nothing is left then).
    """
    temporary, descriptor = _write_temporary(path, data)
    try:
        os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        os.close(descriptor)
        remove_file(temporary)
    try:
        _sync_directory(path.parent)
    except BaseException:
        remove_file(path)
        raise


def remove_unfinished(directory: Path, *, older_than_s: float) -> list[Path]:
    """Remove what writers that were killed have left in a directory; returns what that was.

    For files that are written under no lock: a write takes milliseconds, so one that has not
    changed for `older_than_s` seconds has no writer. Raises OSError.
    """
    limit = time.time() - older_than_s
    found = [
        Path(entry.path)
        for entry in os.scandir(directory)
        if _TEMPORARY.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < limit
    ]
    return [path for path in found if remove_file(path)]


def _write_temporary(path: Path, data: bytes) -> tuple[str, int]:
    # As text: each Path that is made takes longer than the call that it is made for.
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fchmod(descriptor, 0o600)  # Whatever the umask is.
    except BaseException as error:
        os.close(descriptor)
        remove_file(temporary)
        if isinstance(error, OSError):  # write(2) fails without naming the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return temporary, descriptor


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(source: Path | int, limit_bytes: int) -> bytes:
    """Read a whole file or descriptor of at most `limit_bytes`; ValueError when it holds more."""
    opened = source if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    chunks: list[bytes] = []
    total = 0
    try:
        while chunk := os.read(opened, min(1 << 20, limit_bytes + 1 - total)):
            chunks.append(chunk)
            total += len(chunk)
            if total > limit_bytes:
                what = "it" if opened is source else source  # a number tells nobody anything
                raise ValueError(f"{what} is larger than {limit_bytes} bytes")
    finally:
        if opened is not source:
            os.close(opened)
    return b"".join(chunks)


def remove_file(path: Path | str) -> bool:
    """Unlink a file; a missing one is fine. Returns whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def open_without_links(path: Path, flags: int, *, directory: int = syscalls.AT_FDCWD) -> int:
    """Open a path that is there, and in which no component is a symbolic link, close-on-exec.

    With `directory` the path is taken below that descriptor and can't leave it. Raises OSError;
    ELOOP tells that a link was met.
    """
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    if directory != syscalls.AT_FDCWD:
        resolve |= syscalls.RESOLVE_BENEATH
    return syscalls.openat2(directory, str(path), flags, resolve=resolve)


def make_private_directory(path: Path) -> None:
    """Make a directory (and its parents) for root alone, 0700, or take the one that is there.

    Raises UntrustedPath when what is there isn't the caller's own directory.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise UntrustedPath(path, "is not a directory")
    if status.st_uid != os.geteuid():
        raise UntrustedPath(path, f"belongs to uid {status.st_uid}")
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)


def require_trusted(path: Path) -> None:
    """Refuse a path that somebody other than root could change, itself or any directory above.

    A sticky directory (such as /tmp) may stand above it: in one, nobody else can rename or remove
    an entry of root's (inode(7)). Symbolic links are resolved, and each directory on the way is
    held to the rule. Raises UntrustedPath, and OSError when it is missing.
    """
    last = "/"
    for last, status in _steps_of(path):
        _require_steady_step(last, status, (0,))
    _require_closed(last, os.lstat(last))


def require_steady(path: Path) -> None:
    """Refuse a directory that somebody else than root or the caller could rename or replace.

    What is missing may be made by whoever is trusted with the rest. Raises UntrustedPath, OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        for step, status in _steps_of(path):
            _require_steady_step(step, status, (0, os.geteuid()))


def is_plainly_roots(status: os.stat_result) -> bool:
    """Whether an entry is root's and nobody else may write to it, by its own mode."""
    return status.st_uid == 0 and not status.st_mode & _OTHERS_MAY_WRITE


def require_trusted_entry(path: str, status: os.stat_result) -> None:
    """Hold one entry alone to the rule of `require_trusted`; `status` is that of lstat(2)."""
    if is_plainly_roots(status):
        return  # As nearly all are; a start looks at some 150.
    _require_owner(path, status, (0,))
    _require_closed(path, status)


def _require_steady_step(path: str, status: os.stat_result, owners: Collection[int]) -> None:
    _require_owner(path, status, owners)
    if not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        _require_closed(path, status)


def _require_owner(path: str, status: os.stat_result, owners: Collection[int]) -> None:
    if status.st_uid not in owners:
        raise UntrustedPath(Path(path), f"belongs to uid {status.st_uid}, not to root")


def _require_closed(path: str, status: os.stat_result) -> None:
    """What a link leads to is another entry, and its own mode means nothing."""
    if status.st_mode & _OTHERS_MAY_WRITE and not stat.S_ISLNK(status.st_mode):
        mode = stat.S_IMODE(status.st_mode)
        raise UntrustedPath(Path(path), f"can be written by others (mode {mode:04o})")


def _steps_of(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every directory and link that decides what a path names, in the kernel's own order.

    Walked as path_resolution(7) says, `..` after the links before it: to tidy the text up first
    would look at other directories than the kernel does. The last one is no link.
    """
    here = "/"
    yield here, os.lstat(here)
    ahead = _parts_ahead(os.path.join(os.getcwd(), path))
    links = 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = os.path.dirname(here)
            yield here, os.lstat(here)
            continue
        step = os.path.join(here, part)
        status = os.lstat(step)
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = os.readlink(step)
        if target.startswith("/"):
            here = "/"
        ahead.extend(_parts_ahead(target))
    yield here, os.lstat(here)


def _parts_ahead(path: str) -> list[str]:
    """The names in a path, the next one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]

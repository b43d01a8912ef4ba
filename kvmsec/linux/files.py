"""Files that must be whole or absent, and paths that nobody else may steer."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from kvmsec.linux import syscalls
from kvmsec.linux.errors import UntrustedPath


def replace_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Put `data` in place of whatever `path` holds, so that a reader sees the old or the new.

    Not synced: for what means nothing after a power cut. Raises OSError (the old content is then
    untouched and no temporary file is left).
    """
    temporary, descriptor = _write_temporary(path, data, mode)
    os.close(descriptor)
    _rename(temporary, path)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Like `replace_atomically`, and a power cut leaves the old or the new as well.

    Synced before and after the rename.
    """
    temporary, descriptor = _write_temporary(path, data, mode)
    try:
        os.fsync(descriptor)
    except BaseException:
        remove_file(temporary)
        raise
    finally:
        os.close(descriptor)
    _rename(temporary, path)
    _sync_directory(path.parent)


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except BaseException:
        remove_file(temporary)
        raise


def create_exclusively(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Create `path` with `data`, complete from the moment it can be seen.

    Raises FileExistsError when it is there already, and OSError (nothing is left then).
    """
    temporary, descriptor = _write_temporary(path, data, mode)
    try:
        os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        os.close(descriptor)
        remove_file(temporary)
    _sync_directory(path.parent)


def _write_temporary(path: Path, data: bytes, mode: int) -> tuple[Path, int]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fchmod(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        remove_file(temporary)
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
                raise ValueError(f"{source} is larger than {limit_bytes} bytes")
    finally:
        if opened is not source:
            os.close(opened)
    return b"".join(chunks)


def remove_file(path: Path) -> bool:
    """Unlink a file; a missing one is fine. Returns whether there was one."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def open_without_links(
    path: Path, flags: int, mode: int = 0, *, directory: int = syscalls.AT_FDCWD
) -> int:
    """Open a path in which no component is a symbolic link, close-on-exec.

    With `directory` the path is taken below that descriptor and can't leave it. Raises OSError;
    ELOOP tells that a link was met.
    """
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    if directory != syscalls.AT_FDCWD:
        resolve |= syscalls.RESOLVE_BENEATH
    return syscalls.openat2(directory, str(path), flags, mode, resolve=resolve)


def make_private_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory (and its parents) for root alone, or take the one that is there.

    Raises UntrustedPath when what is there isn't the caller's own directory.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UntrustedPath(path, "is not a directory")
    if status.st_uid != os.geteuid():
        raise UntrustedPath(path, f"belongs to uid {status.st_uid}")
    if stat.S_IMODE(status.st_mode) != mode:
        path.chmod(mode)


def require_trusted(path: Path) -> None:
    """Refuse a path that somebody other than root could change, itself or any directory above.

    A sticky directory (such as /tmp) may stand above it: in one, nobody else can rename or remove
    an entry of root's (inode(7)). Symbolic links are resolved, and each directory on the way is
    held to the rule. Raises UntrustedPath, and OSError when it is missing.
    """
    real = Path(os.path.realpath(path))
    for step in _steps_of(path):
        status = step.lstat()
        if status.st_uid != 0:
            raise UntrustedPath(step, f"belongs to uid {status.st_uid}, not to root")
        if stat.S_ISLNK(status.st_mode) or (status.st_mode & stat.S_ISVTX and step != real):
            continue
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise UntrustedPath(step, f"can be written by others than root (mode {mode:04o})")


def _steps_of(path: Path) -> list[Path]:
    """Every path whose owner decides what `path` names: parents, links, and where links lead."""
    steps: dict[Path, None] = {}
    waiting = [Path(os.path.abspath(path))]  # `resolve` would hide the links
    while waiting:
        current = waiting.pop()
        for step in (*reversed(current.parents), current):
            if step in steps:
                continue
            steps[step] = None
            if step.is_symlink():
                target = step.parent / step.readlink()
                waiting.append(Path(os.path.normpath(target)))
    return [*steps, *(Path(os.path.realpath(path)),)]

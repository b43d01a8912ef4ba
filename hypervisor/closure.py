"""What a tree must hold for QEMU to run in it, and not a file more.

The dynamic loader itself is asked for the libraries, QEMU for its data directories and for the
modules that it loads: what these two say holds for every distribution's layout. A program with no
interpreter is its own closure.
"""

import contextlib
import os
import re
import stat
import struct
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

from attrs import evolve, frozen

from hypervisor.errors import ClosureError
from hypervisor.identity import FileIdentity, Memory
from hypervisor.inquiry import Answer, inquire
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed
from kvmsec.linux.files import is_plainly_roots, require_trusted, require_trusted_entry

LOADER_CACHE: Final = Path("/etc/ld.so.cache")
DEADLINE_S: Final = 10.0
_LIBRARY: Final = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_MISSING: Final = re.compile(r"^\s*(\S+) => not found$", re.MULTILINE)
_LOADED: Final = re.compile(r"calling init: (/\S+)$", re.MULTILINE)
_PT_INTERP: Final = 3
_LOOKS: Final = 10  # One takes well under a millisecond, and all of them with their pauses 50.
_LOOK_AGAIN_S: Final = 0.005


Binds = tuple[tuple[str, str], ...]
"""Pairs of (path on the host, the same thing's path inside)."""


@frozen
class Closure:
    """A program and what it opens, by real paths on the host.

    program: where it is inside. A path inside is the one that the loader or QEMU asks for, so no
    symbolic links are needed; none lies below another.
    files: what they were when this was worked out: with another file it is another closure.
    """

    program: str
    binds: Binds
    files: tuple[FileIdentity, ...] = ()


def find_closure(
    binary: Path,
    *,
    accelerator: Literal["kvm", "tcg"],
    credentials: Credentials | None,
    cache: Path | None = None,
) -> Closure:
    """Work out what `binary` needs for our command lines, or recall it while no file changed.

    The loader and QEMU are run as `credentials` (None: as the caller, who isn't root then). With
    credentials the program must be root's and writable by nobody else. The parts are for
    `require_trusted_parts` to look at, before any of them is executed in a jail.

    Raises ClosureError, and UntrustedPath for a program that others may change.
    """
    if credentials is not None:
        require_trusted(binary)  # before it is run, even as somebody else
    memory = Memory(cache) if cache is not None else None
    key = f"closure 3 {accelerator} {binary}"
    if memory is not None and (known := memory.recall(key, Closure)) is not None:
        return known
    found = _Search(binary, credentials).closure(accelerator)
    # The paths inside lead to the sources on the host too, through whatever links there are.
    paths = {str(binary), *(inside for _, inside in found.binds)}
    found = evolve(found, files=tuple(FileIdentity.of(path) for path in sorted(paths)))
    if memory is not None:
        memory.keep(key, found)
    return found


class _Search:
    """One program's closure while it is being put together."""

    def __init__(self, binary: Path, credentials: Credentials | None) -> None:
        self._binary = binary
        self._program = Path(os.path.realpath(binary))
        self._credentials = credentials
        self._inside: set[Path] = {self._program}

    def closure(self, accelerator: str) -> Closure:
        interpreter = self._interpreter(self._program)
        if interpreter is not None:
            self._inside.add(interpreter)
            self._add_libraries(interpreter, self._program)
            if accelerator == "tcg":
                for module in self._modules("-accel", "tcg", "-machine", "none"):
                    self._add_libraries(interpreter, module)
            self._add_data()
        return Closure(str(self._program), tuple(sorted(_binds(self._inside))))

    def _interpreter(self, program: Path) -> Path | None:
        try:
            with program.open("rb") as file:
                return interpreter_of(file.read(1 << 16))
        except (OSError, ValueError, struct.error) as error:
            raise ClosureError(
                self._binary,
                f"is not a program that can be shut in ({error})",
                hint="name the QEMU program itself, not a script that starts it",
            ) from error

    def _add_libraries(self, interpreter: Path, program: Path) -> None:
        self._inside.add(program)
        for uses_cache in (False, True):
            # Without its cache the loader finds what lies in its own directories; then the cache,
            # which tells what else is installed on the host, need not be in the tree.
            options = () if uses_cache else ("--inhibit-cache",)
            told = self._ask(str(interpreter), *options, "--list", str(program))
            text = told.stdout.decode(errors="replace")
            missing = _MISSING.findall(text)
            if told.status == 0 and not missing:
                self._inside |= {Path(path) for path in _LIBRARY.findall(text)}
                self._inside |= {LOADER_CACHE} if uses_cache else set()
                return
        problem = f"{program} needs {', '.join(missing)}" if missing else told.words
        raise ClosureError(self._binary, f"its libraries can't be found: {problem}")

    def _modules(self, *arguments: str) -> list[Path]:
        """What QEMU loads by itself with these arguments, beyond its libraries."""
        told = self._ask(
            *("/usr/bin/env", "LD_DEBUG=files", str(self._program), *arguments),
            *("-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio"),
            input=b'{"execute":"qmp_capabilities"}{"execute":"quit"}',
        )
        if told.status != 0:
            raise ClosureError(self._binary, f"does not start with {arguments}: {told.words}")
        loaded = {Path(os.path.normpath(path)) for path in _LOADED.findall(told.stderr.decode())}
        return sorted(loaded - self._inside)

    def _add_data(self) -> None:
        told = self._ask(str(self._program), "-L", "help")
        if told.status != 0:
            raise ClosureError(self._binary, f"does not name its data directories: {told.words}")
        for line in told.stdout.decode(errors="replace").splitlines():
            directory = Path(os.path.normpath(line.strip()))
            if line.startswith("/") and directory.is_dir():
                self._inside.add(directory)
                self._inside |= set(_link_targets(directory))

    def _ask(self, *argv: str, input: bytes = b"") -> Answer:  # noqa: A002
        try:
            return inquire(argv, credentials=self._credentials, timeout_s=DEADLINE_S, input=input)
        except ChildFailed as error:
            raise ClosureError(self._binary, f"can't be asked: {error.detail}") from error


def interpreter_of(head: bytes) -> Path | None:
    """The loader that an ELF program names (elf(5), PT_INTERP), None for a static one.

    `head` is the beginning of the file. Raises ValueError and struct.error for what isn't a 64-bit
    little-endian ELF file.
    """
    if head[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack("<Q", head[32:40])
    size, count = struct.unpack("<HH", head[54:58])
    for index in range(count):
        # Slices, since an offset from a damaged file may be past what an index can be.
        start = table + index * size
        entry = head[start : start + 56]
        kind, _, offset = struct.unpack("<IIQ", entry[:16])
        if kind == _PT_INTERP:
            (length,) = struct.unpack("<Q", entry[32:40])
            if offset + length > len(head):
                raise ValueError("its interpreter is not at the beginning of the file")
            return Path(head[offset : offset + length].rstrip(b"\0").decode())
    return None


def _link_targets(directory: Path) -> Iterator[Path]:
    """Where the links of a data directory lead out of it, as paths that a link can be followed to.

    Debian keeps firmware in packages of its own and links to it from QEMU's directory.
    """
    with os.scandir(directory) as entries:
        links = [Path(entry.path) for entry in entries if entry.is_symlink()]
    for link in links:
        target = Path(os.path.normpath(directory / link.readlink()))
        if target.exists() and directory not in target.parents:
            yield target


def _binds(inside: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Pairs of source and path inside, without what lies below another path inside."""
    paths = set(inside)
    for path in paths:
        if paths.isdisjoint(path.parents):
            yield os.path.realpath(path), str(path)


def require_trusted_parts(closure: Closure) -> None:
    """Raise UntrustedPath unless each part, and what it lies in, is root's alone to change.

    Raises OSError when a part is missing.

    Looked at for each start, since this shows in no file's identity: about 0.4 ms for fifty
    libraries and a hundred files of data.
    """
    _require_trusted_folders({os.path.dirname(source) for source, _ in closure.binds})
    for source, _ in closure.binds:
        status = os.lstat(source)
        require_trusted_entry(source, status)
        if stat.S_ISDIR(status.st_mode):
            _require_trusted_inside(source)


def _require_trusted_folders(folders: Collection[str]) -> None:
    """What the folders have above them they have in common, so each is looked at once.

    Where one isn't plainly root's alone (a link, a sticky directory) the whole rule decides.
    """
    looked_at = {"/"}
    for folder in folders:
        while folder not in looked_at:
            looked_at.add(folder)
            folder = os.path.dirname(folder)
    found = map(os.lstat, looked_at)
    if all(stat.S_ISDIR(status.st_mode) and is_plainly_roots(status) for status in found):
        return
    for folder in sorted(folders):
        require_trusted(Path(folder))


def _require_trusted_inside(folder: str) -> None:
    """Look at a data directory anew when something in it is gone before it is looked at.

    Whoever upgrades a package renames its files into place: to skip what is gone would pass over
    what it is called now.
    """
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(FileNotFoundError):
            return _require_trusted_entries(folder)
        time.sleep(_LOOK_AGAIN_S)  # There are others in the package, each renamed for itself.
    return _require_trusted_entries(folder)


def _require_trusted_entries(folder: str) -> None:
    """Where a link in a data directory leads to is a part of its own."""
    with os.scandir(folder) as entries:
        for entry in entries:
            require_trusted_entry(entry.path, entry.stat(follow_symlinks=False))
            if entry.is_dir(follow_symlinks=False):
                _require_trusted_entries(entry.path)

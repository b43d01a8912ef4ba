"""One bounded snapshot of a process, whoever's it is.

A hostile process may make a reader wait (a page of its arguments that a filesystem of its own
never delivers) and show it any text. So what it could hold up is read in children with a deadline,
sizes are bounded, and each part that fails leaves the others whole: `Facts.unread` says why.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from hypervisor import limits
from hypervisor.foreign_text import escaped
from kvmsec.audit.arguments import parse_cmdline, read_arguments
from kvmsec.audit.control_groups import read_control_group
from kvmsec.audit.discovery import executable_of, is_qemu
from kvmsec.audit.facts import (
    NAMESPACES,
    Arguments,
    CoreSink,
    Credentials,
    Facts,
    Limit,
    Namespaces,
    Sharers,
    Sockets,
    Tree,
)
from kvmsec.audit.held import Held, read_held
from kvmsec.audit.identity import read_credentials, read_sharers
from kvmsec.audit.process_files import ProcessFiles, ProcessGone, TooMuch, open_host
from kvmsec.audit.sockets import read_sockets
from kvmsec.audit.tree import read_tree
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, Fault

DEADLINE_S: Final = 5.0
_ARGUMENTS_BYTES: Final = 1 << 20
_ENVIRONMENT_BYTES: Final = 1 << 20
_ATTEMPTS: Final = 3
_REASON_CHARS: Final = 160
_PATH_CHARS: Final = 120
_NAME_CHARS: Final = 32
_VARIABLES_SHOWN: Final = 8
_SECRET_WORDS: Final = ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "CREDENTIAL")
_CAPABILITY_NEEDED: Final = (errno.EACCES, errno.EPERM)
_PARTS: Final = (
    *("executable", "credentials", "sharers", "namespaces", "descriptors", "sockets", "tree"),
    *("control_group", "limits", "is_dumpable", "oom_score_adj", "arguments", "secret_variables"),
)
"""Those of `Facts` that are read here; `packets` adds what it finds."""
_EXPECTED: Final = (OSError, Fault, ValueError, KeyError, IndexError)

_T = TypeVar("_T")


class ProcessChanges(Fault):
    """A process became another program or user while it was read, again and again."""

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"the process {pid} changes while it is read", hint="try again in a moment"
        )
        self.pid = pid


def read_facts(pid: int, *, sockets: Sequence[str] = (), deadline_s: float = DEADLINE_S) -> Facts:
    """What there is to know of a process itself, at one moment: read again if it changed meanwhile.

    The packet rules are the host's, see `packets`. `sockets` are paths where files of its listeners
    may be, which are else looked for. Each part has `deadline_s` seconds. The caller has one
    thread. Raises ProcessGone, ProcessChanges and ManyThreads.
    """
    for _ in range(_ATTEMPTS):
        with ProcessFiles(pid) as files:
            if not files.is_there():
                raise ProcessGone(pid)
            before = _signature(files)
            try:
                facts = _Reader(files, sockets, deadline_s).read()
            except (FileNotFoundError, ProcessLookupError):  # What stands in no `_part`.
                raise ProcessGone(pid) from None
            if not files.is_there():
                raise ProcessGone(pid)
            if _signature(files) == before:
                return facts
    raise ProcessChanges(pid)


def nothing_read(pid: int, reason: str) -> Facts:
    """What is known of a process of which nothing can be: its name. Raises ProcessGone."""
    with ProcessFiles(pid) as files:
        try:
            if not files.is_there():
                raise ProcessGone(pid)
            return Facts(
                pid=pid,
                start_ticks=files.start_ticks(),
                comm=_comm(files),
                has_terminal=files.has_terminal(),
                unread=dict.fromkeys(_PARTS, escaped(reason, limit_chars=_REASON_CHARS)),
            )
        except (FileNotFoundError, ProcessLookupError, ValueError):
            raise ProcessGone(pid) from None


def _comm(files: ProcessFiles) -> str:
    return escaped(files.read("comm", 64).removesuffix(b"\n"), limit_chars=_NAME_CHARS)


def _signature(files: ProcessFiles) -> tuple[object, ...]:
    """What an exec or a change of user changes; the descriptor of /proc/PID pins the process."""
    try:
        status = files.status_of("status")
        return files.start_ticks(), files.stack_start(), status.st_uid, _executable(files)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        raise ProcessGone(files.pid) from None


def _executable(files: ProcessFiles) -> tuple[str | None, bool]:
    try:
        path, is_deleted = executable_of(files)
    except OSError:
        return None, False
    return escaped(path, limit_chars=_PATH_CHARS), is_deleted


class _Reader:
    """Reads part by part, and notes why a part is missing."""

    def __init__(self, files: ProcessFiles, sockets: Sequence[str], deadline_s: float) -> None:
        self._files = files
        self._socket_paths = sockets
        self._deadline_s = deadline_s
        self._unread: dict[str, str] = {}

    def read(self) -> Facts:
        files = self._files
        who = self._part("credentials", Credentials, lambda: read_credentials(files))
        held = self._part("descriptors", Held, lambda: read_held(files))
        path, is_deleted = _executable(files)
        return Facts(
            pid=files.pid,
            start_ticks=files.start_ticks(),
            comm=_comm(files),
            executable=path,
            is_executable_deleted=is_deleted,
            credentials=who,
            sharers=self._of(who, "sharers", Sharers, _sharers(files)),
            namespaces=self._at_once("namespaces", lambda: _namespaces(files)),
            descriptors=held.descriptors if held else None,
            sockets=self._of(held, "sockets", Sockets, _sockets(files, self._socket_paths)),
            tree=self._of(who, "tree", Tree, lambda found: read_tree(files, found)),
            control_group=self._at_once("control_group", lambda: read_control_group(files)),
            limits=self._at_once("limits", lambda: _limits(files)),
            core_goes_to=_core_goes_to(),
            is_dumpable=self._at_once("is_dumpable", lambda: _is_dumpable(files, who)),
            oom_score_adj=self._at_once("oom_score_adj", lambda: _oom_score_adj(files)),
            has_terminal=files.has_terminal(),
            label=self._optional(lambda: _label(files)),
            arguments=self._part(
                "arguments",
                Arguments,
                lambda: read_arguments(parse_cmdline(files.read("cmdline", _ARGUMENTS_BYTES))),
            ),
            secret_variables=self._part(
                "secret_variables",
                tuple[str, ...],
                lambda: secret_variables(files.read("environ", _ENVIRONMENT_BYTES)),
            ),
            unread=self._unread,
        )

    def _of(self, known: Any, name: str, kind: type[_T], read: Callable[[Any], _T]) -> _T | None:
        """A part that can be read only once another one is known."""
        if known is None:
            self._unread[name] = "what it depends on could not be read"
            return None
        return self._part(name, kind, lambda: read(known))

    def _part(self, name: str, kind: Any, read: Callable[[], _T]) -> _T | None:
        """Read in a child and take its answer word by word; None when that failed."""
        try:
            answer = run_in_child(
                lambda: _answer(read),
                what=f"reading {name.replace('_', ' ')} of process {self._files.pid}",
                timeout_s=self._deadline_s,
                keep=(self._files.directory,),
            )
            if "problem" in answer:
                self._unread[name] = escaped(str(answer["problem"]), limit_chars=_REASON_CHARS)
                return None
            found: _T = msgspec.convert(answer["found"], kind)
            return found
        except (ChildFailed, ChildTimedOut) as failure:
            self._unread[name] = escaped(failure.message, limit_chars=_REASON_CHARS)
        except msgspec.ValidationError as error:
            self._unread[name] = escaped(str(error), limit_chars=_REASON_CHARS)
        return None

    def _at_once(self, name: str, read: Callable[[], _T]) -> _T | None:
        """Read what the kernel alone answers, which no process can make wait."""
        try:
            return read()
        except _EXPECTED as error:
            self._unread[name] = escaped(_problem(error), limit_chars=_REASON_CHARS)
            return None

    @staticmethod
    def _optional(read: Callable[[], str]) -> str | None:
        try:
            return read()
        except (OSError, TooMuch):
            return None


def _answer(read: Callable[[], Any]) -> dict[str, Any]:
    """The child's part: what was found, or why nothing was."""
    try:
        return {"found": msgspec.to_builtins(read())}
    except _EXPECTED as error:
        return {"problem": _problem(error)}


def _problem(error: Exception) -> str:
    if isinstance(error, OSError):
        words = error.strerror or str(error)
        return f"{words} (root may look)" if error.errno in _CAPABILITY_NEEDED else words
    return str(error) if isinstance(error, Fault | TooMuch) else f"unexpected: {error}"


# Parts ---------------------------------------------------------------------------------------


def _sharers(files: ProcessFiles) -> Callable[[Credentials], Sharers]:
    return lambda who: read_sharers(files, who.uids, is_qemu)


def _sockets(files: ProcessFiles, paths: Sequence[str]) -> Callable[[Held], Sockets]:
    return lambda held: read_sockets(files, held.socket_inodes, paths)


def _namespaces(files: ProcessFiles) -> Namespaces:
    shared: list[str] = []
    own: list[str] = []
    with open_host() as host:
        for kind in NAMESPACES:
            try:
                is_shared = files.link(f"ns/{kind}") == host.link(f"ns/{kind}")
            except FileNotFoundError:
                continue  # A kernel without this kind.
            (shared if is_shared else own).append(kind)
    interfaces = _interfaces(files.read("net/dev")) if "net" in own else None
    return Namespaces(tuple(shared), tuple(own), None if interfaces is None else tuple(interfaces))


def _interfaces(table: bytes) -> Iterator[str]:
    for line in table.split(b"\n")[2:]:
        name, separator, _ = line.partition(b":")
        if separator:
            yield escaped(name.strip(), limit_chars=_NAME_CHARS)


def _limits(files: ProcessFiles) -> dict[str, Limit]:
    return dict(parse_limits(files.read("limits", 1 << 16)))


def parse_limits(text: bytes) -> Iterator[tuple[str, Limit]]:
    """The rows of a /proc/PID/limits: `open files`, `processes`, `core file size` and so on."""
    for name, shown in limits.parse_limits(text.decode(errors="replace")).items():
        yield name.removeprefix("Max "), Limit(*map(_limit, shown))


def _limit(word: str) -> int | None:
    return None if word == "unlimited" else int(word)


def _core_goes_to() -> CoreSink | None:
    """By how the kernel's pattern begins (core(5); sockets since Linux 6.16, fs/coredump.c)."""
    try:
        with open("/proc/sys/kernel/core_pattern", "rb") as file:
            first = file.read(1)
    except OSError:
        return None
    return "program" if first == b"|" else "socket" if first == b"@" else "file"


def _is_dumpable(files: ProcessFiles, who: Credentials | None) -> bool | None:
    """Files of a process that isn't dumpable are root's in /proc (proc(5)); root's always are."""
    if who is None:
        return None
    return who.uid == 0 or files.status_of("status").st_uid != 0


def _oom_score_adj(files: ProcessFiles) -> int:
    return int(files.read("oom_score_adj", 64))


def _label(files: ProcessFiles) -> str:
    """The security module's word for it (AppArmor, SELinux)."""
    raw = files.read("attr/current", 4096).rstrip(b"\0\n")
    return escaped(raw, limit_chars=_PATH_CHARS)


def secret_variables(environ: bytes) -> tuple[str, ...]:
    """The names of variables that look like secrets; no value."""
    names = (entry.partition(b"=")[0] for entry in environ.split(b"\0") if entry)
    shown = (
        escaped(name, limit_chars=_NAME_CHARS)
        for name in names
        if any(word in name.decode(errors="replace").upper() for word in _SECRET_WORDS)
    )
    return tuple(dict.fromkeys(shown))[:_VARIABLES_SHOWN]

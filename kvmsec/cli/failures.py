"""What becomes of an error: a line or two on stderr, and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterable
from typing import Final

import click

from kvmsec.cli.output import ReaderGone, complain, remark, shown_text
from kvmsec.linux.errors import Fault

FAILED: Final = 1
WRONG_USAGE: Final = 2
CHECK_FOUND_ERRORS: Final = 3
_SIGNALLED: Final = 128
"""A shell's status of a command that a signal ended is this and the signal's number."""

_HINTS: Final = {
    errno.ENOSPC: "make room, or inodes: see `df` and `df -i`",
    errno.EDQUOT: "make room within the quota: see `quota`",
    errno.EACCES: "see who may do this: `ls -ld` of the path, and what AppArmor or SELinux logged",
    errno.EPERM: "run this as root on the host itself; a container, AppArmor or SELinux may refuse",
    errno.EROFS: "mount it for writing, or keep all files elsewhere with --root",
    errno.EMFILE: "let this process have more files open: ulimit -n",
    errno.ENFILE: "let the host have more files open: sysctl fs.file-max",
}


class Terminated(Exception):
    """A signal told us to end; what had been begun was undone, as far as its notes don't differ."""

    def __init__(self, number: int, notes: Iterable[str] = ()) -> None:
        super().__init__(number)
        self.number = number
        for note in notes:
            self.add_note(note)


class WrongUsage(click.UsageError):
    """Wrong usage with something better to say than "see --help"."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class WrongValue(click.BadParameter):
    """An option's or argument's text that can't be meant, whatever the node's state is."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.hint = fault.hint


def report(error: BaseException, *, is_debug: bool) -> int:
    """Say on stderr what went wrong, and what could not be undone; returns the exit status."""
    status = _report(error, is_debug=is_debug)
    for note in notes_of(error):
        remark(note)
    return status


def notes_of(error: BaseException) -> tuple[str, ...]:
    """What was noted on an error on its way up (PEP 678), by whoever tried to undo its work."""
    notes = getattr(error, "__notes__", ())
    # Anybody may set the attribute to anything.
    return tuple(map(str, notes)) if isinstance(notes, list | tuple) else ()


def _report(error: BaseException, *, is_debug: bool) -> int:
    if is_debug and not isinstance(error, click.ClickException | ReaderGone):
        _print_traceback(error)
    match error:
        case ReaderGone():
            silence_stdout()
            return FAILED
        case click.ClickException():
            return _report_usage(error)
        case Fault():
            complain(error.message, error.hint)
            return FAILED
        case click.Abort() | KeyboardInterrupt():
            return _report(Terminated(signal.SIGINT), is_debug=False)
        case Terminated():
            complain("interrupted" if error.number == signal.SIGINT else "terminated")
            return _SIGNALLED + error.number
        case OSError():
            complain(_what_failed(error), _HINTS.get(error.errno or 0) or _where(error, is_debug))
            return FAILED
        case _:
            complain(
                f"unexpected {type(error).__name__}: {error}",
                None if is_debug else "this is a bug; `kvmsec --debug …` shows where it happened",
            )
            return FAILED


def _report_usage(error: click.ClickException) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # which click 8.1 doesn't have
        error.show()
        return WRONG_USAGE
    hint = getattr(error, "hint", None)
    context = getattr(error, "ctx", None)
    if hint is None and context is not None:
        hint = f"see `{context.command_path} --help`"
    complain(error.format_message(), hint)
    return WRONG_USAGE


def _where(error: OSError, is_debug: bool) -> str | None:
    """How to find out what failed, should the error's own words not tell."""
    if is_debug or error.filename is not None:
        return None
    return "`kvmsec --debug …` shows where it happened"


def _what_failed(error: OSError) -> str:
    """The path, where there is one, and the system's own words."""
    words = error.strerror or str(error) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if _is_path(path)]
    return f"{' -> '.join(paths)}: {words}" if paths else words


def _is_path(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _print_traceback(error: BaseException) -> None:
    import traceback

    for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
        click.echo(shown_text(line), err=True)


def silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere, instead of failing aloud."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

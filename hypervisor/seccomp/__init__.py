"""kvmsec's own filter of system calls: under QEMU's, which lets much through, and before it.

The table is in `rules`, what makes a program of it in `library`, and what lets exactly one program
be executed in `gate`. Compiled once and remembered; a child that is being shut in only hands the
finished bytes to the kernel.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from attrs import field, frozen

from hypervisor.identity import FileIdentity, Memory
from hypervisor.seccomp.gate import (
    EXECVE,
    FIRST_OF_RULES,
    INSTRUCTION,
    IO_SETUP,
    TICKET_BYTES,
    gate,
)
from hypervisor.seccomp.library import Library, NoFilter, load_library
from hypervisor.seccomp.rules import RULES, Rule
from kvmsec.linux import syscalls

__all__ = ["EXECVE", "IO_SETUP", "TICKET_BYTES", "Filter", "NoFilter", "find_filter"]

_LIMIT: Final = 4096  # linux/bpf_common.h, BPF_MAXINSNS
_MACHINE: Final = "x86_64"  # what `gate` has the numbers for


@frozen
class Filter:
    """A compiled filter, as libseccomp wrote it.

    program: the kernel's instructions, 8 bytes each; the gate comes before them.
    library: the version of libseccomp that compiled it.
    files: where that was loaded from; empty where no file is the one in use.
    """

    program: bytes = field(repr=False)
    library: str
    files: tuple[FileIdentity, ...] = field(default=(), eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Raise ValueError for what can't be a filter; the kernel checks every jump."""
        size = INSTRUCTION.size
        if len(self.program) % size or not self.program.startswith(FIRST_OF_RULES):
            raise ValueError("this is no compiled filter")
        if self.length > _LIMIT:
            raise ValueError(f"{self.length} instructions, the kernel takes {_LIMIT}")

    @property
    def length(self) -> int:
        """How many instructions the kernel is given."""
        return len(self.with_gate(bytes(TICKET_BYTES))) // INSTRUCTION.size

    def with_gate(self, ticket: bytes, absent: Sequence[int] = ()) -> bytes:
        """The whole program, for one process: see `hypervisor.seccomp.gate`."""
        return gate(ticket, absent) + self.program

    def put_in_force(self, ticket: bytes, absent: Sequence[int] = ()) -> None:
        """Hold the calling process to it for good, and try that it is: `with_gate`'s arguments.

        Wants no_new_privs. Raises PermissionError where a denied call passes, and OSError.
        """
        syscalls.filter_system_calls(self.with_gate(ticket, absent))
        if syscalls.seccomp_mode() != syscalls.SECCOMP_MODE_FILTER:
            raise PermissionError("the kernel shows no filter")
        try:
            syscalls.unshare(0)  # Nothing at all, and nobody needs a privilege for it.
        except PermissionError:
            return
        raise PermissionError("the filter is there, and lets a denied call pass")


@frozen
class _Kept:
    """A filter on disk; a digest, for a flipped bit is a filter as well, only another one."""

    filter: Filter
    digest: str

    @classmethod
    def of(cls, made: Filter) -> "_Kept":
        return cls(made, hashlib.sha256(made.program).hexdigest())

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return self.filter.files

    @property
    def is_whole(self) -> bool:
        return hashlib.sha256(self.filter.program).hexdigest() == self.digest


def find_filter(cache: Path | None = None, rules: Sequence[Rule] = RULES) -> Filter:
    """Compile a table, or recall what was compiled while it, libseccomp and the machine stay.

    About a millisecond to compile, a tenth to recall. Raises NoFilter.
    """
    machine = os.uname().machine
    if machine != _MACHINE:
        raise NoFilter(f"it is for {_MACHINE}, and this machine is {machine}")
    digest = _digest_of_ours() if rules is RULES else _digest_of(rules)
    memory = Memory(cache) if cache is not None else None
    key = f"seccomp 2 {machine} {digest}"
    known = memory.recall(key, _Kept) if memory is not None else None
    if known is not None and known.is_whole:
        return known.filter
    made = _compiled(load_library(), rules)
    if memory is not None:
        memory.keep(key, _Kept.of(made))
    return made


def _digest_of(rules: Sequence[Rule]) -> str:
    return hashlib.sha256(repr(tuple(rules)).encode()).hexdigest()


@cache
def _digest_of_ours() -> str:
    return _digest_of(RULES)


def _files_of(library: Library) -> tuple[FileIdentity, ...]:
    try:
        return tuple(map(FileIdentity.of, library.files))
    except OSError:  # One that was replaced meanwhile, or of which nothing is seen from here.
        return ()


def _compiled(library: Library, rules: Sequence[Rule]) -> Filter:
    try:
        return Filter(library.compile(rules), library.version, _files_of(library))
    except ValueError as error:
        version = library.version
        raise NoFilter(f"libseccomp {version} made one that is of no use: {error}") from error

"""libseccomp, in this process: it turns a table of rules into a program for the kernel."""

import ctypes
import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hypervisor.errors import HypervisorError
from hypervisor.seccomp.rules import Answer, Comparison, Rule

_LIBRARY: Final = "libseccomp.so.2"
_ALLOW: Final = 0x7FFF0000  # linux/seccomp.h, SECCOMP_RET_ALLOW
# seccomp.h, enum scmp_filter_attr and enum scmp_compare
_ACT_BADARCH, _CTL_OPTIMIZE = 2, 8
_OPERATORS: Final = {"equal": 4, "greater": 6, "masked": 7}
_SIZE_LIMIT_BYTES: Final = 1 << 16


class NoFilter(HypervisorError):
    """A filter of system calls can't be made on this host."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"no filter of system calls can be made: {problem}",
            hint="install libseccomp 2.5.2 or later (apt-get install libseccomp2), or do without "
            'it, in kvmsec.toml: confinement.may_be_missing = ["seccomp"]',
        )
        self.problem = problem


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


class _Comparison(ctypes.Structure):
    """seccomp.h, struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class Library:
    """libseccomp (seccomp_init(3) and others). Every call raises NoFilter."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def version(self) -> str:
        seen = self._library.seccomp_version().contents
        return f"{seen.major}.{seen.minor}.{seen.micro}"

    @property
    def files(self) -> tuple[str, ...]:
        """Where the library was loaded from, and the name that the loader looked for there.

        Empty where a newer one has taken its place since: then no file is the one in use.
        """
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return files_in(maps)

    def compile(self, rules: Iterable[Rule]) -> bytes:
        """The rules as a program of the kernel's (struct sock_filter, 8 bytes each).

        Calls of another architecture, x32's among them, end the process.
        """
        with self._context() as context:
            status = self._library.seccomp_attr_set(context, _ACT_BADARCH, Answer.KILL.value)
            _require(status, "the answer for other architectures")
            # A tree of comparisons, for which the kernel takes half the time to load it.
            _require(self._library.seccomp_attr_set(context, _CTL_OPTIMIZE, 2), "a binary tree")
            for rule in rules:
                for call in rule.calls:
                    self._add(context, rule, call)
            return self._export(context)

    @contextmanager
    def _context(self) -> Iterator[int]:
        context = self._library.seccomp_init(_ALLOW)
        if not context:
            raise NoFilter("libseccomp gives no context (out of memory?)")
        try:
            yield context
        finally:
            self._library.seccomp_release(context)

    def _add(self, context: int, rule: Rule, call: str) -> None:
        number = self.number_of(call)
        for comparison in rule.when or (None,):
            compared = (_Comparison * 1)(*[_compared(comparison)] if comparison else [])
            count = 1 if comparison else 0
            status = self._library.seccomp_rule_add_exact_array(
                context, rule.answer.value, number, count, compared
            )
            _require(status, f"the rule for {call}")

    def number_of(self, call: str) -> int:
        """The number of a call of this architecture; raises NoFilter."""
        number: int = self._library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            raise NoFilter(f"libseccomp {self.version} knows no system call {call}")
        return number

    def _export(self, context: int) -> bytes:
        descriptor = os.memfd_create("kvmsec-seccomp", os.MFD_CLOEXEC)
        try:
            _require(self._library.seccomp_export_bpf(context, descriptor), "the finished program")
            return os.pread(descriptor, _SIZE_LIMIT_BYTES, 0)
        finally:
            os.close(descriptor)


def files_in(maps: Iterable[str]) -> tuple[str, ...]:
    """`Library.files`, from the lines of /proc/self/maps (proc_pid_maps(5))."""
    mapped = [line.split(maxsplit=5)[-1].strip() for line in maps if "/libseccomp.so" in line]
    if any(path.endswith(" (deleted)") for path in mapped):
        return ()
    names = {str(Path(path).with_name(_LIBRARY)) for path in mapped}
    return tuple(sorted({*mapped, *(name for name in names if os.path.exists(name))}))


def _compared(comparison: Comparison) -> _Comparison:
    operator = _OPERATORS[comparison.operator]
    if comparison.operator == "masked":  # SCMP_CMP_MASKED_EQ has the mask first
        return _Comparison(comparison.argument, operator, comparison.mask, comparison.value)
    return _Comparison(comparison.argument, operator, comparison.value, 0)


def _require(status: int, what: str) -> None:
    if status < 0:
        raise NoFilter(f"libseccomp refuses {what}: {os.strerror(-status)}")


@functools.cache
def load_library() -> Library:
    """libseccomp with its prototypes. Raises NoFilter where the host has none, or an old one."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "seccomp_version": (ctypes.POINTER(_Version), []),
        "seccomp_init": (pointer, [ctypes.c_uint32]),
        "seccomp_release": (None, [pointer]),
        "seccomp_attr_set": (number, [pointer, number, ctypes.c_uint32]),
        "seccomp_syscall_resolve_name": (number, [ctypes.c_char_p]),
        "seccomp_rule_add_exact_array": (
            number,
            [pointer, ctypes.c_uint32, number, ctypes.c_uint, ctypes.POINTER(_Comparison)],
        ),
        "seccomp_export_bpf": (number, [pointer, number]),
    }
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, (result, arguments) in prototypes.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NoFilter(str(error)) from error
    return Library(library)

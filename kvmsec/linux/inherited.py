"""Which descriptors a process would still have after an exec, asked of the kernel without /proc."""

import array
import ctypes
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Final

_F_GETFD: Final = 1
_FD_CLOEXEC: Final = 1
# struct pollfd in one word: the number, no events asked for, and what was found.
_IS_LITTLE: Final = sys.byteorder == "little"
_NUMBER_AT: Final = 0 if _IS_LITTLE else 32
_FOUND_AT, _BYTES = 6 if _IS_LITTLE else 7, 8
_IS_OPEN: Final = re.compile(rb"[^\x20]")  # POLLNVAL, linux/include/uapi/asm-generic/poll.h
_ASKED_EACH: Final = 32


def survivors(below: int) -> set[int]:
    """The caller's descriptors with a number under `below` that an exec would not close.

    `below` is at most the caller's RLIMIT_NOFILE. One poll(2) finds what is open among them all,
    but for O_PATH, which it takes for closed; so the lowest numbers, which are the ones that are
    handed out, are each asked for by fcntl(2) as well. Raises OSError.
    """
    libc = _libc()
    asked = {*range(min(below, _ASKED_EACH)), *_open(libc, below)}
    # -1, for one that isn't open, has the flag like any other bit.
    return {number for number in asked if not libc.fcntl(number, _F_GETFD) & _FD_CLOEXEC}


def _open(libc: ctypes.PyDLL, below: int) -> Iterator[int]:
    asked = array.array("q", range(0, below << _NUMBER_AT, 1 << _NUMBER_AT))
    if libc.poll(asked.buffer_info()[0], below, 0) < 0:
        raise OSError(f"poll(2) of {below} descriptors is refused")
    return (found.start() for found in _IS_OPEN.finditer(asked.tobytes()[_FOUND_AT::_BYTES]))


@cache
def _libc() -> ctypes.PyDLL:
    """Without giving the interpreter's lock back for each call, which takes longer than it does."""
    libc = ctypes.PyDLL(None)
    libc.fcntl.argtypes = (ctypes.c_int, ctypes.c_int)
    libc.poll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int)
    return libc

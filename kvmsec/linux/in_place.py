"""A fork without a copy: the child goes on in the memory of its parent, which then only sleeps.

As with vfork(2) the kernel holds the parent until the child has executed a program, or has ended.
But a child of vfork(2) may not return from the function that called it, since its parent comes back
to the same stack. Here the parent never comes back: a few instructions of its own, which need no
stack, close its descriptors and let it sleep for ever. So the child may do whatever the parent
could have done, and nobody takes the memory apart before the parent is killed.
"""

import contextlib
import ctypes
import mmap
import os
import re
import signal
from functools import cache
from typing import Any, Final

from kvmsec.linux import syscalls
from kvmsec.linux.syscalls import CloneArguments

COPIED_BYTES: Final = 64 << 20
"""The most that `copy_shared_pages` copies: three times what a command has."""
_CLONE_VM: Final = 0x100
_CLONE_VFORK: Final = 0x4000
_MADV_POPULATE_WRITE: Final = 23
_MAX_DESCRIPTOR: Final = 2**31 - 1
_RESIDENT: Final = re.compile(b"[^\x00]+")
_CODE: Final = {
    "x86_64": (
        b"\xb8\xb3\x01\x00\x00"  # mov  $435, %eax    clone3(rdi, rsi)
        b"\x0f\x05"  # syscall
        b"\x85\xc0"  # test %eax, %eax
        b"\x7f\x01"  # jg   1f             in the parent
        b"\xc3"  # ret                    in the child, and after an error
        b"\x31\xff"  # 1: xor %edi, %edi
        b"\x83\xce\xff"  # or   $-1, %esi
        b"\x31\xd2"  # xor  %edx, %edx
        b"\xb8\xb4\x01\x00\x00"  # mov  $436, %eax    close_range(0, ~0, 0)
        b"\x0f\x05"  # syscall
        b"\xb8\x22\x00\x00\x00"  # 2: mov $34, %eax   pause()
        b"\x0f\x05"  # syscall
        b"\xeb\xf7"  # jmp  2b
    )
}
"""By `os.uname().machine`, for a Python of 64 bits."""


def become_child(flags: int, cgroup: int = -1) -> None:
    """Return in a child that was made by clone3(2) with these flags, and never in the caller.

    The caller has one thread. Once the child has executed a program, or has ended, the caller has
    no descriptor any more, and sleeps until it is killed. Where this is not possible (another
    processor, or nobody may execute memory that was written) the child has a copy of the memory,
    and the caller sleeps at once.

    What the child makes the kernel allocate for its memory and in a tmpfs is charged to the
    caller's control groups, until the caller is killed or the child executes a program (the
    memory's owner, linux/mm/memcontrol.c).

    `cgroup` is a descriptor of a version 2 control group for it to be born in, or -1. Raises
    OSError, in the caller, which then goes on.
    """
    clone = _clone_or_sleep()
    if clone is None:
        pid, _ = syscalls.clone3(flags, cgroup)
        if pid:
            os.closerange(0, _MAX_DESCRIPTOR)
        while pid:
            signal.pause()
        return
    arguments = CloneArguments.of(flags | _CLONE_VM | _CLONE_VFORK, cgroup)
    result = clone(ctypes.byref(arguments), ctypes.sizeof(arguments))
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def is_possible() -> bool:
    """Whether caller and child share their memory; what it takes is there then, for forks too."""
    return _clone_or_sleep() is not None


@cache
def _clone_or_sleep() -> Any:
    """The instructions as a function; None where they can't be had."""
    code = _CODE.get(os.uname().machine)
    if code is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, mmap.PAGESIZE, private, mmap.PROT_READ | mmap.PROT_WRITE)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        syscalls.protect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError:
        return None
    # A PYFUNCTYPE keeps the interpreter's lock, which the child then has as the caller had it.
    function = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t)(address)

    def call(arguments: Any, size_bytes: int, _memory: mmap.mmap = memory) -> int:
        return int(function(arguments, size_bytes))

    return call


def copy_shared_pages() -> None:
    """Copy now what a fork left to be copied when it is first written to, up to `COPIED_BYTES`.

    Where the kernel can't, nothing is done: madvise(2), MADV_POPULATE_WRITE, Linux 5.14.
    """
    left = COPIED_BYTES
    with open("/proc/self/maps") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        addresses, mode = line.split()[:2]
        if mode != "rw-p":
            continue
        start, end = (int(one, 16) for one in addresses.split("-"))
        found = b""
        with contextlib.suppress(OSError):  # It was unmapped meanwhile.
            found = syscalls.resident_pages(start, end - start)
        for run in _RESIDENT.finditer(found):
            first, size = (one * mmap.PAGESIZE for one in (run.start(), len(run[0])))
            syscalls.advise(start + first, min(size, left), _MADV_POPULATE_WRITE)
            left -= min(size, left)

"""System calls that are refused to the calling process from then on, as in a container."""

import struct

from kvmsec.linux import syscalls

ADD_KEY, REQUEST_KEY, KEYCTL = 248, 249, 250  # linux/arch/x86/entry/syscalls/syscall_64.tbl
_LOAD, _EQUAL, _END = 0x20, 0x15, 0x06  # linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h


def answer(number: int, *calls: int) -> None:
    """Have the kernel answer these calls with an error number from now on; 0 is no error."""
    program = [(_LOAD, 0, 0, 0)]  # struct seccomp_data begins with the call's number.
    for left, call in zip(reversed(range(len(calls))), calls, strict=True):
        program.append((_EQUAL, left + 1, 0, call))
    program += [(_END, 0, 0, _ALLOW), (_END, 0, 0, _ERRNO | number)]
    syscalls.filter_system_calls(b"".join(struct.pack("<HBBI", *one) for one in program))

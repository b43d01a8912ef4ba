"""One program may be executed and no second: what stands before the compiled rules.

A filter sees the number of a call and its six arguments, not the memory that they point to. It
can't count either. So it can't tell the execve(2) that starts QEMU from a later one by its path;
but execve has three arguments, and the kernel ignores what is in the registers of the other three.
The jail puts a random number of 192 bits there, its ticket, and the filter lets an execve pass
that shows it. After the execve nobody inside has it: the registers are cleared, the memory is
gone, and to read a filter back takes CAP_SYS_ADMIN over the node (ptrace(2),
PTRACE_SECCOMP_GET_FILTER). Whoever guesses wrong is killed.
"""

import struct
from collections.abc import Sequence
from typing import Final

from hypervisor.seccomp.rules import NEWEST, Answer

TICKET_BYTES: Final = 24
ARCHITECTURE: Final = 0xC000003E  # linux/audit.h, AUDIT_ARCH_X86_64
X32_BIT: Final = 0x40000000  # asm/unistd.h, __X32_SYSCALL_BIT
EXECVE: Final = 59
IO_SETUP: Final = 206
INSTRUCTION: Final = struct.Struct("<HBBI")  # linux/filter.h, struct sock_filter

# linux/bpf_common.h
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_GREATER: Final = 0x25
_IF_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# linux/seccomp.h, struct seccomp_data
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_ALLOW: Final = 0x7FFF0000

FIRST_OF_RULES: Final = b"\x20\0\0\0\4\0\0\0"
"""How a compiled program begins: it loads for itself the architecture that the call is of."""


def gate(ticket: bytes, absent: Sequence[int] = ()) -> bytes:
    """Instructions that let an execve with this ticket pass, and no other.

    Calls above NEWEST are unknown here, and so are those of `absent`, which one process has no use
    for and another may have. All the rest, other architectures too, goes on to the instruction
    that follows these.
    """
    if len(ticket) != TICKET_BYTES:
        raise ValueError(f"a ticket has {TICKET_BYTES} bytes, not {len(ticket)}")
    words = struct.unpack("<6I", ticket)
    # Words 0 and 1 are the fourth argument's low and high half, and so on.
    shown = [(_ARGUMENTS + 8 * 3 + 4 * index, word) for index, word in enumerate(words)]
    allow = 6 + len(absent) + 2 * len(shown)
    kill, unknown, rules = allow + 1, allow + 2, allow + 3
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 0, rules - 2, ARCHITECTURE),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, rules - 4, 0, X32_BIT),
        (_IF_GREATER, unknown - 5, 0, NEWEST),
    ]
    for number in absent:
        program.append((_IF_EQUAL, unknown - len(program) - 1, 0, number))
    program.append((_IF_EQUAL, 0, rules - len(program) - 1, EXECVE))
    for offset, word in shown:
        program += [
            (_LOAD, 0, 0, offset),
            (_IF_EQUAL, 0, kill - len(program) - 2, word),
        ]
    program += [
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, Answer.KILL.value),
        (_RETURN, 0, 0, Answer.NO_SUCH_CALL.value),
    ]
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in program)

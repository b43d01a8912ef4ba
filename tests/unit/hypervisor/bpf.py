"""What the kernel does with a filter of system calls, told for a call that is never made."""

from collections.abc import Sequence

from hypervisor.seccomp.gate import INSTRUCTION

X86_64, I386 = 0xC000003E, 0x40000003  # linux/audit.h
ALLOW = 0x7FFF0000


def answer(
    program: bytes, number: int, arguments: Sequence[int] = (), *, architecture: int = X86_64
) -> int:
    """Run a program (struct sock_filter each) for one call; returns linux/seccomp.h's value."""
    words = [number, architecture, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    code = list(INSTRUCTION.iter_unpack(program))
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        match operation:
            case 0x20:  # ld [k]
                accumulator = words[k // 4]
            case 0x54:  # and #k
                accumulator &= k
            case 0x05:  # ja k
                at += k
            case 0x15:  # jeq
                at += if_true if accumulator == k else if_false
            case 0x25:  # jgt
                at += if_true if accumulator > k else if_false
            case 0x35:  # jge
                at += if_true if accumulator >= k else if_false
            case 0x06:  # ret
                return int(k)
            case _:
                raise AssertionError(f"an instruction that no filter has: {operation:#x}")

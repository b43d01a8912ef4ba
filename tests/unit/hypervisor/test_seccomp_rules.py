"""The table of denied system calls: what stands in it, and that the compiled program says it."""

import errno
import fcntl
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.seccomp import TICKET_BYTES, find_filter
from hypervisor.seccomp.gate import ARCHITECTURE, EXECVE, IO_SETUP, X32_BIT, gate
from hypervisor.seccomp.library import NoFilter, load_library
from hypervisor.seccomp.rules import NEWEST, RULES, Answer, Comparison, Rule
from tests.unit.hypervisor.bpf import ALLOW, I386, X86_64, answer

TICKET = bytes(range(1, 1 + TICKET_BYTES))
SHOWN = tuple(int.from_bytes(TICKET[at : at + 8], "little") for at in (0, 8, 16))
PROGRAM = find_filter().with_gate(TICKET)
KILL = Answer.KILL.value


def number_of(call: str) -> int:
    return load_library().number_of(call)


def rule_of(call: str) -> Rule:
    return next(rule for rule in RULES if call in rule.calls)


def holds(comparison: Comparison, arguments: tuple[int, ...]) -> bool:
    given_one = arguments[comparison.argument]
    match comparison.operator:
        case "equal":
            return given_one == comparison.value
        case "greater":
            return given_one > comparison.value
        case "masked":
            return given_one & comparison.mask == comparison.value


# The table


def test_every_rule_has_a_reason_and_a_source() -> None:
    for rule in RULES:
        assert rule.calls
        assert len(rule.reason) > 10, rule
        assert "(2)" in rule.source or "(7)" in rule.source, rule


def test_no_call_stands_there_twice_but_for_what_is_asked_of_it() -> None:
    as_such = [call for rule in RULES if not rule.when for call in rule.calls]
    asked = {call: rule.answer for rule in RULES if rule.when for call in rule.calls}
    assert sorted(as_such) == sorted(set(as_such))
    assert asked.keys().isdisjoint(as_such)
    for rule in RULES:
        if rule.when:
            assert {asked[call] for call in rule.calls} == {rule.answer}


def test_every_call_is_one_that_was_looked_at() -> None:
    assert all(number_of(call) <= NEWEST for rule in RULES for call in rule.calls)


def test_what_qemus_own_filter_lets_through_is_denied() -> None:
    """Each of them was seen to pass QEMU 7.2's full sandbox, or to be left out of its list."""
    wanted = {
        *("add_key", "keyctl", "request_key", "bpf", "perf_event_open", "userfaultfd", "ptrace"),
        *("io_uring_setup", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
        *("unshare", "setns", "clone3", "mount_setattr", "move_mount", "fsmount", "open_tree"),
        *("open_by_handle_at", "execveat", "shmget", "semget", "msgget", "mq_open", "setgroups"),
        *("personality", "modify_ldt", "init_module", "finit_module", "kexec_file_load"),
    }
    denied = {call for rule in RULES if not rule.when for call in rule.calls}
    assert wanted <= denied
    partly = {("clone",), ("fcntl",), ("ioctl",), ("setsockopt",), ("socket",), ("socketpair",)}
    assert {rule.calls for rule in RULES if rule.when} == partly


def test_a_masked_comparison_can_come_true() -> None:
    for rule in RULES:
        for comparison in rule.when:
            assert (comparison.mask != 0) == (comparison.operator == "masked")
            if comparison.operator == "masked":
                assert comparison.value & ~comparison.mask == 0


@pytest.mark.parametrize(
    "call",
    [
        *("read", "write", "mmap", "mprotect", "futex", "ppoll", "ioctl", "io_submit", "io_setup"),
        *("prctl", "seccomp", "exit_group", "rt_sigreturn", "kill", "tgkill", "pidfd_open"),
        *("accept4", "recvmsg", "eventfd2", "signalfd4", "timerfd_create", "memfd_create"),
        *("set_robust_list", "rseq", "arch_prctl", "getrandom", "sched_yield", "madvise", "fork"),
    ],
)
def test_what_qemu_and_the_c_library_live_on_is_allowed(call: str) -> None:
    assert answer(PROGRAM, number_of(call)) == ALLOW


# What the program says


def test_the_program_answers_each_call_as_the_table_says() -> None:
    whole = {number_of(call): rule for rule in RULES if not rule.when for call in rule.calls}
    partly = {number_of(call) for rule in RULES if rule.when for call in rule.calls}
    for number in range(NEWEST + 1):
        if number in partly or number == EXECVE:
            continue
        wanted = whole[number].answer.value if number in whole else ALLOW
        assert answer(PROGRAM, number) == wanted, number
        assert answer(PROGRAM, number, [2**64 - 1] * 6) == wanted, number


def test_a_call_that_nobody_looked_at_does_not_exist() -> None:
    for number in (NEWEST + 1, 467, 1000, X32_BIT - 1):
        assert answer(PROGRAM, number) == Answer.NO_SUCH_CALL.value


def test_what_a_process_has_no_use_for_does_not_exist_and_all_else_is_as_it_was() -> None:
    whole = find_filter().with_gate(TICKET, (IO_SETUP,))
    assert number_of("io_setup") == IO_SETUP
    assert answer(whole, IO_SETUP) == Answer.NO_SUCH_CALL.value
    assert answer(whole, EXECVE, (0, 0, 0, *SHOWN)) == ALLOW
    for architecture in (X86_64, I386):
        for number in (*range(NEWEST + 2), X32_BIT, X32_BIT + IO_SETUP):
            if number != IO_SETUP or architecture != X86_64:
                wanted = answer(PROGRAM, number, architecture=architecture)
                assert answer(whole, number, architecture=architecture) == wanted, number


def test_calls_of_another_architecture_end_the_process() -> None:
    # Not -1: libseccomp lets a tracer skip a call by it, and the kernel has no such call.
    for number in (0, 1, 11, EXECVE, 400, X32_BIT, X32_BIT + 1, X32_BIT + 520, 2**32 - 2):
        assert answer(PROGRAM, number, architecture=I386) == KILL
        if number >= X32_BIT:
            assert answer(PROGRAM, number, [0, 0, 0, *SHOWN]) == KILL
    assert answer(PROGRAM, EXECVE, [0, 0, 0, *SHOWN], architecture=I386) == KILL
    assert ARCHITECTURE == X86_64


@pytest.mark.parametrize("call", ["clone", "socket", "socketpair"])
def test_arguments_are_compared_as_the_table_says(call: str) -> None:
    rule, number = rule_of(call), number_of(call)
    # Around each bit and each small number, with and without bits above an int's.
    values = sorted({*range(48), *(1 << bit for bit in range(64)), 2**32 + 1, 2**64 - 1})
    for first in values:
        for second, third in ((1, 0), (2, 17), (1, 6), (3, 0), (0x80801, 0), (10, 8), (1, 2**33)):
            arguments = (first, second, third, 0, 0, 0)
            is_denied = any(holds(comparison, arguments) for comparison in rule.when)
            wanted = rule.answer.value if is_denied else ALLOW
            assert answer(PROGRAM, number, arguments) == wanted, arguments


@given(
    family=st.integers(0, 2**64 - 1) | st.integers(0, 50),
    kind=st.integers(0, 2**32 - 1) | st.integers(0, 16),
    protocol=st.integers(0, 2**64 - 1) | st.integers(0, 300),
)
def test_no_socket_is_let_pass_but_the_three_families_streams_and_datagrams(
    family: int, kind: int, protocol: int
) -> None:
    """As the kernel reads the arguments: an int each, the type's low four bits."""
    said = answer(PROGRAM, number_of("socket"), (family, kind, protocol))
    is_plain = (
        family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        and kind & 0xF in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        and protocol in (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    )
    assert said == (ALLOW if is_plain else Answer.NO_SUCH_FAMILY.value)


@given(st.integers(0, 2**64 - 1))
def test_no_clone_makes_a_namespace(flags: int) -> None:
    new = 0x7E020000
    said = answer(PROGRAM, number_of("clone"), (flags,))
    assert said == (KILL if flags & new else ALLOW)


@given(st.integers(0, 2**64 - 1))
def test_no_fcntl_locks_a_part_of_a_file(command: int) -> None:
    for one in (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW):
        for shown in (one, one | command << 32 & 2**64 - 1):  # the kernel takes an int for it
            said = answer(PROGRAM, number_of("fcntl"), (3, shown, 0))
            assert said == Answer.NO_LOCKS.value
    locks = {fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW}
    if command & 0xFFFFFFFF not in locks:
        assert answer(PROGRAM, number_of("fcntl"), (3, command, 0)) == ALLOW


# linux/if_tun.h: TUNSETDEBUG, TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP, TUNSETCARRIER
OF_TAPS = (0x400454C9, 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE, 0x400454E2)
# linux/sockios.h: SIOCGIFNAME, SIOCSIFHWADDR, SIOCGSKNS, SIOCETHTOOL; linux/wireless.h:
# SIOCGIWNAME; linux/pr.h: IOC_PR_REGISTER, IOC_PR_CLEAR; linux/loop.h: LOOP_SET_STATUS64,
# LOOP_CLR_FD
OF_OTHERS = (0x8910, 0x8924, 0x894C, 0x8946, 0x8B01, 0x401870C8, 0x401070CD, 0x4C04, 0x4C01)
KINDS = (0x89, 0x8B, 0x70, 0x4C)


@given(st.sampled_from(OF_TAPS + OF_OTHERS), st.integers(0, 2**64 - 1))
def test_no_ioctl_reaches_what_is_the_nodes(request: int, high: int) -> None:
    ioctl = number_of("ioctl")
    shown = (request | high << 32) & 2**64 - 1
    assert answer(PROGRAM, ioctl, (3, shown, 1)) == Answer.NOT_PERMITTED.value
    if high & 0xFFFFFFFF not in OF_TAPS and high >> 8 & 0xFF not in KINDS:
        assert answer(PROGRAM, ioctl, (3, high, request)) == ALLOW


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_socket_is_bound_to_an_interface(option: int, high: int) -> None:
    setsockopt = number_of("setsockopt")
    for binding in (25, 62):
        said = answer(PROGRAM, setsockopt, (3, socket.SOL_SOCKET, binding | high << 32))
        assert said == Answer.NOT_PERMITTED.value
    if option not in (25, 62):
        assert answer(PROGRAM, setsockopt, (3, socket.SOL_SOCKET, option)) == ALLOW


def test_what_qemu_asks_of_kvm_files_and_block_devices_is_allowed() -> None:
    for request in (0xAE80, 0x4020AE46, 0x80081272, 0x1277, 0xC020660B, 0x5421, 0x541B, 0x2285):
        # KVM_RUN, KVM_SET_USER_MEMORY_REGION, BLKGETSIZE64, BLKDISCARD, FS_IOC_FIEMAP, FIONBIO,
        # FIONREAD, SG_IO
        assert answer(PROGRAM, number_of("ioctl"), (3, request, 1)) == ALLOW


def test_what_qemu_sets_on_a_tap_is_allowed() -> None:
    for request in (0x400454D0, 0x400454D4, 0x400454D8, 0x400454DC, 0x800454D2):
        # TUNSETOFFLOAD, TUNSETSNDBUF, TUNSETVNETHDRSZ, TUNSETVNETLE, TUNGETIFF
        assert answer(PROGRAM, number_of("ioctl"), (3, request, 1)) == ALLOW


def test_threads_can_be_made() -> None:
    pthread_create = 0x3D0F00  # glibc 2.36: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, ...
    assert answer(PROGRAM, number_of("clone"), (pthread_create,)) == ALLOW
    assert answer(PROGRAM, number_of("clone3")) == Answer.NO_SUCH_CALL.value


# One execve


def test_an_execve_passes_with_the_ticket_alone() -> None:
    assert answer(PROGRAM, EXECVE, (1, 2, 3, *SHOWN)) == ALLOW
    assert answer(PROGRAM, EXECVE, (1, 2, 3)) == KILL
    assert answer(PROGRAM, EXECVE, (*SHOWN, 0, 0, 0)) == KILL
    assert answer(PROGRAM, number_of("execveat"), (1, 2, 3, *SHOWN)) == KILL


@given(st.integers(0, 8 * TICKET_BYTES - 1))
def test_one_wrong_bit_of_a_ticket_is_enough(bit: int) -> None:
    wrong = [*SHOWN]
    wrong[bit // 64] ^= 1 << (bit % 64)
    assert answer(PROGRAM, EXECVE, (1, 2, 3, *wrong)) == KILL


@pytest.mark.parametrize("size", [0, TICKET_BYTES - 1, TICKET_BYTES + 1])
def test_a_ticket_has_its_length(size: int) -> None:
    with pytest.raises(ValueError, match="a ticket has 24 bytes"):
        gate(bytes(size))


# The answers


def test_answers_are_the_errors_that_programs_know() -> None:
    told = {one.name: one.errno for one in Answer}
    assert told == {
        "KILL": None,
        "NOT_PERMITTED": errno.EPERM,
        "NO_SUCH_CALL": errno.ENOSYS,
        "NO_LOCKS": errno.ENOLCK,
        "NO_SUCH_FAMILY": errno.EAFNOSUPPORT,
    }


# The library


def test_a_call_that_the_library_does_not_know_is_said() -> None:
    rule = Rule(("no_such_call",), Answer.KILL, "a reason", "a source")
    with pytest.raises(NoFilter, match="knows no system call no_such_call"):
        load_library().compile([rule])


def test_a_rule_that_the_library_refuses_is_said() -> None:
    rule = Rule(("read",), Answer.KILL, "a reason", "a source", (Comparison(9, "equal", 0),))
    with pytest.raises(NoFilter, match="refuses the rule for read"):
        load_library().compile([rule])


def test_compiling_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    load_library().compile(RULES)
    assert os.listdir("/proc/self/fd") == before

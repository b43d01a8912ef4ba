"""Is this host ready? Every check, one after the other, each with its fix.

Each check runs in a child process of its own, some of them at once: what one does to itself (leave
a namespace, load a library that may crash) ends with it, and one that hangs or dies is an error
of its own and never the end of the others. Nothing is changed, and nothing is left behind.
"""

import asyncio
import os
import socket
from typing import Any, Final

import attrs

from kvmsec.agent import Finding
from kvmsec.linux.children import start_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, Fault
from kvmsec.node.doctor import accounts, engine, filters, kernel, places
from kvmsec.node.doctor.subject import Answer, Check, Subject, error
from kvmsec.node.host import Host
from kvmsec.node.waiting import collect

DEADLINE_S: Final = 15.0
AT_ONCE: Final = 4
_BROKEN_HINT: Final = "the check itself did not work: try it again, then report it as a fault"

CHECKS: Final = (
    Check("system", "system", kernel.check_system),
    Check("system-calls", "system calls", kernel.check_system_calls),
    Check("namespaces", "namespaces", kernel.check_namespaces),
    Check("privileges", "privileges", kernel.check_privileges),
    Check("filter", "system call filter", kernel.check_filter),
    Check("session-keyring", "session keyring", kernel.check_keyring),
    Check("ptrace", "ptrace", kernel.check_ptrace),
    Check("io-uring", "io_uring", kernel.check_io_uring),
    Check("call-log", "log of calls", kernel.check_call_log),
    Check("cgroups", "control groups", kernel.check_cgroups),
    Check("cgroup-parent", "control group parent", kernel.check_cgroup_parent),
    Check("directories", "directories", places.check_directories),
    Check("configuration", "configuration", places.check_configuration),
    Check("definitions", "definitions", places.check_definitions),
    Check("space", "space", places.check_space),
    Check("clock", "clock", places.check_clock),
    Check("qemu", "QEMU", engine.check_qemu),
    Check("qemu-files", "QEMU's files", engine.check_qemu_files),
    Check("kvm", "KVM", engine.check_kvm),
    Check("tcg", "TCG", engine.check_tcg),
    Check("packet-filter", "packet filter", filters.check_backends),
    Check("packet-rules", "packet rules", filters.check_rules),
    Check("tun", "taps", filters.check_tun),
    Check("vhost-net", "vhost-net", filters.check_vhost_net),
    Check("bridge", "bridges", filters.check_bridge),
    Check("pool", "uid pool", accounts.check_pool_users),
    Check("reaper", "reaper", accounts.check_reaper),
    Check("uids", "uids", accounts.check_claims),
    Check("instances", "instances", accounts.check_instances),
)


async def examine(host: Host, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Hold every check against this node, and return what they found in the checks' order.

    Needs root: without it there is one finding, which says so. Takes about a second.
    """
    node = socket.gethostname()
    if os.geteuid() != 0:
        missing = error("root is needed to look at this host", "run `kvmsec doctor` as root")
        return [_finding(Check("root", "root", lambda subject: ()), missing, node)]
    subject = Subject.of(host)
    turns = asyncio.Semaphore(AT_ONCE)
    answers = await asyncio.gather(*(_ask(check, subject, turns) for check in checks))
    return [
        _finding(check, answer, node)
        for check, found in zip(checks, answers, strict=True)
        for answer in found
    ]


async def _ask(check: Check, subject: Subject, turns: asyncio.Semaphore) -> list[Answer]:
    async with turns:
        try:
            child = start_child(lambda: _answers(check, subject), what=f"checking {check.item}")
            return [Answer(*answer) for answer in await collect(child, DEADLINE_S)]
        except ChildFailed as failure:
            return [error(f"{failure.kind}: {failure.detail}", _BROKEN_HINT)]
        except (ChildTimedOut, OSError) as failure:
            return [error(str(failure), _BROKEN_HINT)]


def _answers(check: Check, subject: Subject) -> list[tuple[Any, ...]]:
    """The child's part; what was found before a failure still counts."""
    found: list[Answer] = []
    try:
        found.extend(check.look(subject))
    except Fault as fault:
        found.append(error(fault.message, fault.hint))
    except OSError as failure:
        found.append(error(str(failure), "see why the kernel or the file system refuses this"))
    return [attrs.astuple(answer) for answer in found]


def _finding(check: Check, answer: Answer, node: str) -> Finding:
    return Finding(check.code, answer.severity, check.item, answer.message, answer.hint, node)

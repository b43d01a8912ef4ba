"""Which QEMU an instance gets, what it can do, what its jail must hold for it and deny it."""

import os
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from hypervisor.closure import Closure, find_closure
from hypervisor.features import Features, find_qemu, probe
from hypervisor.identity import FileIdentity, Memory, still_hold
from hypervisor.machine import Machine
from hypervisor.seccomp import Filter, NoFilter, find_filter
from kvmsec.errors import KvmsecError
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.files import require_trusted
from kvmsec.node.host import Host

_KVM: Final = Path("/dev/kvm")
_NOBODY: Final = Credentials(65534, 65534)


class NoKvm(KvmsecError):
    """KVM was asked for and this host hasn't got it."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"hardware virtualization can't be used: {_KVM}: {reason}",
            hint="load kvm_intel or kvm_amd and switch virtualization on in the firmware, or ask "
            "for --accel tcg, which is slow and not a security boundary in QEMU's own policy",
        )


@frozen
class Engine:
    """A QEMU that was looked at: its features, its files, and the accelerator that is used.

    system_calls: kvmsec's own filter for it; None where this node may do without.
    """

    binary: Path
    features: Features
    closure: Closure
    accelerator: Literal["kvm", "tcg"]
    system_calls: Filter | None


@frozen
class _Known:
    """An engine, and the files that all that is known of it stands on."""

    engine: Engine
    files: tuple[FileIdentity, ...]


_known: Final[dict[tuple[Path, str, Path], _Known]] = {}
"""By program, accelerator, and where the answers lie. A node starts many instances with one."""


def engine_for(host: Host, machine: Machine) -> Engine:
    """Find the QEMU for a machine, and ask it what it can do and what it needs.

    What this process knows already is told as long as no file changes that it stands on. Raises
    NoKvm, NoFilter, and what `hypervisor.features` and `hypervisor.closure` raise.
    """
    binary = find_qemu(machine.qemu, host.config.qemu.path)
    accelerator = _accelerator(machine)
    question = binary, accelerator, host.paths.features
    known = _known.get(question)
    if known is not None and _holds(known):
        require_trusted(binary)  # That others may replace it by now shows in no file.
        return known.engine
    memory = Memory(host.paths.features)
    engine = Engine(
        binary,
        probe(binary, credentials=_NOBODY, memory=memory),
        find_closure(binary, accelerator=accelerator, credentials=_NOBODY, memory=memory),
        accelerator,
        _filter_for(host, memory),
    )
    if engine.system_calls is not None and (files := memory.basis()):
        _known[question] = _Known(engine, files)
    return engine


def _holds(known: _Known) -> bool:
    try:
        return still_hold(known.files)
    except OSError:
        return False


def _filter_for(host: Host, memory: Memory) -> Filter | None:
    try:
        return find_filter(memory)
    except NoFilter:
        if "seccomp" in host.config.confinement.may_be_missing:
            return None
        raise


def _accelerator(machine: Machine) -> Literal["kvm", "tcg"]:
    """The accelerator asked for: a fallback happens under `auto` alone, and is shown."""
    if machine.accelerator == "tcg":
        return "tcg"
    problem = _kvm_problem()
    if problem is None:
        return "kvm"
    if machine.accelerator == "auto":
        return "tcg"
    raise NoKvm(problem)


def _kvm_problem() -> str | None:
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None

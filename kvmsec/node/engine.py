"""Which QEMU an instance gets, what it can do, what its jail must hold for it and deny it."""

import os
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from hypervisor.closure import Closure, find_closure
from hypervisor.features import Features, find_qemu, probe
from hypervisor.machine import Machine
from hypervisor.seccomp import Filter, NoFilter, find_filter
from kvmsec.errors import KvmsecError
from kvmsec.linux.credentials import Credentials
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


def engine_for(host: Host, machine: Machine) -> Engine:
    """Find the QEMU for a machine, and ask it what it can do and what it needs.

    Raises NoKvm, NoFilter, and what `hypervisor.features` and `hypervisor.closure` raise.
    """
    binary = find_qemu(machine.qemu, host.config.qemu.path)
    cache = host.paths.features
    accelerator = _accelerator(machine)
    return Engine(
        binary,
        probe(binary, credentials=_NOBODY, cache=cache),
        find_closure(binary, accelerator=accelerator, credentials=_NOBODY, cache=cache),
        accelerator,
        _filter_for(host),
    )


def _filter_for(host: Host) -> Filter | None:
    try:
        return find_filter(host.paths.features)
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

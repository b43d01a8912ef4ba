"""Which QEMU an instance gets, what it can do, what its jail must hold for it and deny it."""

import os
import time
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from hypervisor.closure import Closure, find_closure
from hypervisor.features import Features, find_qemu, probe
from hypervisor.identity import FileIdentity, is_settled, still_hold
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

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        """What all that is known of it stands on; empty where a part of it stands on no file."""
        features, closure = self.features.files, self.closure.files
        system_calls = self.system_calls.files if self.system_calls is not None else ()
        if features and closure and system_calls:
            return features + closure + system_calls
        return ()


def engine_for(host: Host, machine: Machine) -> Engine:
    """Find the QEMU for a machine, and ask it what it can do and what it needs.

    What this process knows already is told as long as no file changes that it stands on. Raises
    NoKvm, NoFilter, and what `hypervisor.features` and `hypervisor.closure` raise.
    """
    binary = find_qemu(machine.qemu, host.config.qemu.path)
    accelerator = _accelerator(machine)
    known = host.engines.get((binary, accelerator))
    if known is not None and _holds(known):
        require_trusted(binary)  # That others may replace it by now shows in no file.
        return known
    asked_ns = time.time_ns()
    cache = host.paths.features
    engine = Engine(
        binary,
        probe(binary, credentials=_NOBODY, cache=cache),
        find_closure(binary, accelerator=accelerator, credentials=_NOBODY, cache=cache),
        accelerator,
        _filter_for(host),
    )
    if engine.files and is_settled(engine.files, asked_ns):
        host.engines[binary, accelerator] = engine
    return engine


def _holds(engine: Engine) -> bool:
    try:
        return still_hold(engine.files)
    except OSError:
        return False


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

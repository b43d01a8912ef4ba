"""QEMU, and whether each accelerator really runs a guest in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from hypervisor.closure import Closure, find_closure, require_trusted_parts
from hypervisor.errors import HypervisorError
from hypervisor.features import Features, find_qemu, probe
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault
from kvmsec.linux.files import read_bounded
from kvmsec.node.doctor import places
from kvmsec.node.doctor.subject import Answer, Subject, error, ok, warning
from kvmsec.node.trial import NOBODY, TrialFailed, boot_tiny_guest

_DEADLINE_S: Final = 5.0
_KVM: Final = Path("/dev/kvm")
_NO_BOUNDARY: Final = "TCG is slow, and no security boundary in QEMU's own policy"
_NO_QEMU: Final = warning(
    "not tried: there is no QEMU to try it with", "mend first what is said of QEMU"
)


@frozen
class _Qemu:
    binary: Path
    features: Features


def _find(subject: Subject) -> _Qemu:
    """Asked anew, since nothing may be written and a remembered answer proves little."""
    binary = find_qemu(None, subject.configured_qemu)
    return _Qemu(binary, probe(binary, credentials=NOBODY))


def check_qemu(subject: Subject) -> Iterator[Answer]:
    """Found, nobody else's to change, and new enough."""
    qemu = _find(subject)
    package = f" ({qemu.features.package})" if qemu.features.package else ""
    yield ok(f"{qemu.binary}: version {qemu.features.version_text}{package}")
    if not qemu.features.sandbox:
        yield error("it was built without seccomp", "install a QEMU whose -sandbox works")


def check_qemu_files(subject: Subject) -> Iterator[Answer]:
    """All that a jail must hold of it can be worked out, and is nobody else's to change."""
    try:
        qemu = _find(subject)
    except Fault:
        yield _NO_QEMU
        return
    for accelerator in _built_in(qemu.features):
        closure = _trusted_closure(qemu, accelerator)
        yield ok(f"{len(closure.binds)} files and directories in a jail for {accelerator}")


def _built_in(features: Features) -> Iterator[Literal["kvm", "tcg"]]:
    if "kvm" in features.accelerators:
        yield "kvm"
    if "tcg" in features.accelerators:
        yield "tcg"


def check_kvm(subject: Subject) -> Iterator[Answer]:
    """The device alone proves nothing: a guest has to say so."""
    if not _KVM.exists():
        yield _without_kvm(subject, f"there is no {_KVM}", _how_to_get_kvm())
        return
    try:
        qemu = _find(subject)
    except Fault:
        yield _NO_QEMU
        return
    if "kvm" not in qemu.features.accelerators:
        hint = "install a QEMU with KVM: apt install qemu-system-x86"
        yield _without_kvm(subject, f"{qemu.binary} was built without KVM", hint)
        return
    try:
        took_s = _boot(qemu, "kvm")
    except TrialFailed as failure:
        hint = "see the end of `dmesg`; in a virtual machine, see whether its host allows nesting"
        found = f"{_KVM} is there, but the tiny guest does not boot: {failure.message}"
        yield _without_kvm(subject, found, hint)
        return
    # Seen: a /dev/kvm whose emulator lacks what every 64-bit kernel needs.
    yield ok(
        f"the tiny guest booted in {took_s:.2f} s, in a jail as uid {NOBODY.uid}; it runs in real "
        "mode, which says little about 64-bit kernels"
    )


def check_tcg(subject: Subject) -> Iterator[Answer]:
    """Emulation: for hosts without KVM, and never a silent substitute for it."""
    try:
        qemu = _find(subject)
    except Fault:
        yield _NO_QEMU
        return
    if "tcg" not in qemu.features.accelerators:
        yield ok(f"{qemu.binary} was built without it; only `--accel tcg` would need it")
        return
    try:
        took_s = _boot(qemu, "tcg")
    except TrialFailed as failure:
        hint = "reinstall QEMU's packages, if you want to use `--accel tcg`"
        yield warning(f"the tiny guest does not boot: {failure.message}", hint)
        return
    yield ok(f"the tiny guest booted in {took_s:.2f} s; {_NO_BOUNDARY}")


def _boot(qemu: _Qemu, accelerator: Literal["kvm", "tcg"]) -> float:
    """Seconds until it spoke. Raises TrialFailed, and HypervisorError for QEMU's files."""
    closure = _trusted_closure(qemu, accelerator)
    return boot_tiny_guest(closure, qemu.features, accelerator, timeout_s=_DEADLINE_S)


def _trusted_closure(qemu: _Qemu, accelerator: Literal["kvm", "tcg"]) -> Closure:
    closure = find_closure(qemu.binary, accelerator=accelerator, credentials=NOBODY)
    require_trusted_parts(closure)
    return closure


def _without_kvm(subject: Subject, found: str, hint: str) -> Answer:
    """An error, unless the definitions of this node all say that they can do without."""
    if _tcg_is_meant(subject):
        return warning(f"{found}; every definition here allows TCG, but {_NO_BOUNDARY}", hint)
    return error(found, hint)


def _tcg_is_meant(subject: Subject) -> bool:
    wanted = []
    for path in sorted(subject.paths.definitions.glob("*.toml")):
        try:
            wanted.append(places.read(path).machine.accelerator)
        except (KvmsecError, HypervisorError, OSError):
            return False
    return bool(wanted) and "kvm" not in wanted


def _how_to_get_kvm() -> str:
    flags = read_bounded(Path("/proc/cpuinfo"), 1 << 24).split()
    if b"vmx" in flags:
        return "modprobe kvm_intel"
    if b"svm" in flags:
        return "modprobe kvm_amd"
    where = "the hypervisor below" if b"hypervisor" in flags else "the firmware's settings"
    return (
        f"switch hardware virtualization on in {where}, then: modprobe kvm_intel (or kvm_amd); "
        "without it, ask for --accel tcg"
    )

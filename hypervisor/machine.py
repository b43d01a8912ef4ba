"""The types of a machine's definition, with every rule about a field beside the field.

A value of these types kept all rules when it was made: code that gets one checks nothing again.
Paths are the host's and absolute; whoever reads a command line resolves relative ones.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from attrs import Attribute, field, frozen

from hypervisor.errors import Problem, SpecError

HugePages = Literal["2M", "1G"]
Accelerator = Literal["kvm", "tcg", "auto"]
ImageFormat = Literal["raw", "qcow2"]
DiskDevice = Literal["virtio", "scsi", "ide", "cdrom"]
Cache = Literal["writeback", "none", "writethrough", "directsync", "unsafe"]
Aio = Literal["threads", "native"]
NicModel = Literal["virtio", "e1000", "e1000e", "rtl8139"]

MAX_MEMORY_MIB: Final = 8 * 1024 * 1024 - 1
"""KVM takes no memory slot of 2^31 pages of 4 KiB or more (KVM_MEM_MAX_NR_PAGES, kvm_main.c)."""
MAX_VCPUS: Final = 255
"""A CPU past APIC id 254 needs interrupt remapping, so an IOMMU, which no machine here has."""
MAX_DISKS: Final = 16
MAX_NICS: Final = 8
"""With a SCSI controller that is 25 of the 28 PCI slots that both pc and q35 leave free."""
MAX_MMIO_DEVICES: Final = 8
"""The virtio-mmio transports of a microvm with one I/O APIC (QEMU, docs/system/i386/microvm)."""
MAX_BACKING_FILES: Final = 16
MAX_PATH_BYTES: Final = 4095
"""PATH_MAX less its NUL (limits.h)."""
MAX_KERNEL_LINE_BYTES: Final = 2047
"""x86's COMMAND_LINE_SIZE less its NUL (arch/x86/include/asm/setup.h)."""
MAX_WEIGHT: Final = 10_000
"""The kernel's own range is 1 to this (CGROUP_WEIGHT_MAX, include/linux/cgroup.h)."""
MAX_QUOTA: Final = 100 * 8192
"""In percent of one CPU: as many CPUs as an x86-64 kernel can be built for (NR_CPUS)."""
MAX_OOM_SCORE: Final = 1000
"""OOM_SCORE_ADJ_MAX (include/uapi/linux/oom.h)."""
IDE_PORTS: Final = {"pc": 4, "q35": 6, "microvm": 0}
"""Two channels of two disks on the PIIX, six AHCI ports on the ICH9, none on a microvm."""
MAC_PREFIX: Final = "52:54:00"
"""The locally administered prefix that QEMU gives to its own NICs."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
MACHINE_TYPE: Final = re.compile(r"pc|q35|microvm|pc-(?:i440fx|q35)-[a-z0-9][a-z0-9.-]{0,31}")
_CPU: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_SERIAL: Final = re.compile(r"[A-Za-z0-9_.+-]{1,20}")
HUGE_PAGES_MIB: Final[Mapping[HugePages, int]] = {"2M": 2, "1G": 1024}
"""The sizes of huge pages on x86 (Documentation/admin-guide/mm/hugetlbpage.rst)."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@frozen
class Rule:
    """An attrs validator that can also be asked for the problem without raising it."""

    problem_of: Callable[[Any], str | None]
    is_optional: bool = False

    def check(self, value: object) -> str | None:
        """What is wrong with a value of the field's type, or None."""
        if value is None and self.is_optional:
            return None
        return self.problem_of(value)

    def __call__(self, instance: object, attribute: "Attribute[Any]", value: object) -> None:
        problem = self.check(value)
        if problem is not None:
            source = type(instance).__name__.lower()
            raise SpecError(source, [Problem(attribute.name, problem)])


def _matches(pattern: re.Pattern[str], wanted: str) -> Callable[[str], str | None]:
    # fullmatch, since `$` would let a trailing newline through.
    return lambda text: None if pattern.fullmatch(text) else f"{_shown(text)} is not {wanted}"


def _one_of(*choices: str, is_optional: bool = False) -> Rule:
    listed = ", ".join(choices[:-1]) + f" or {choices[-1]}"

    def problem(text: str) -> str | None:
        return None if text in choices else f"{_shown(text)} is not {listed}"

    return Rule(problem, is_optional)


def _between(low: int, high: int) -> Rule:
    return Rule(lambda n: None if low <= n <= high else f"{n} is not between {low} and {high}")


def _at_most(limit: int, what: str) -> Rule:
    def problem(values: Collection[object]) -> str | None:
        return None if len(values) <= limit else f"{len(values)} {what}, at most {limit} are taken"

    return Rule(problem)


def _path_problem(path: Path) -> str | None:
    text = str(path)
    if _CONTROL.search(text):
        return f"{_shown(text)} holds a control character"
    if not path.is_absolute():
        return f"{_shown(text)} is not an absolute path"
    if len(text.encode()) > MAX_PATH_BYTES:
        return f"the path is longer than {MAX_PATH_BYTES} bytes"
    return None


def _cpu_problem(model: str) -> str | None:
    if model == "help":
        return "'help' is not a CPU model"
    return _matches(_CPU, "a CPU model (letters, digits, '.', '_' and '-')")(model)


def _append_problem(text: str) -> str | None:
    if _CONTROL.search(text):
        return "holds a control character"
    if len(text.encode()) > MAX_KERNEL_LINE_BYTES:
        return f"is longer than {MAX_KERNEL_LINE_BYTES} bytes"
    return None


def _mac_problem(mac: str) -> str | None:
    if not _MAC.fullmatch(mac):
        return f"{_shown(mac)} is not a MAC address such as 52:54:00:12:34:56 (lower case)"
    if int(mac[:2], 16) & 1:
        return f"{mac} is a multicast address"
    if mac == "00:00:00:00:00:00":
        return "a NIC can't have the address zero"
    return None


def _shown(text: str) -> str:
    """A value as it may stand in an error: escaped, and never longer than a line."""
    return ascii(text) if len(text) <= 80 else f"{text[:80]!a}…"


_PATH: Final = Rule(_path_problem)
_MAYBE_PATH: Final = Rule(_path_problem, is_optional=True)
_MAYBE_WEIGHT: Final = Rule(_between(1, MAX_WEIGHT).problem_of, is_optional=True)
_MAYBE_QUOTA: Final = Rule(_between(1, MAX_QUOTA).problem_of, is_optional=True)
_MAYBE_OOM_SCORE: Final = Rule(_between(-MAX_OOM_SCORE, MAX_OOM_SCORE).problem_of, is_optional=True)
_MAYBE_INTERFACE: Final = Rule(
    _matches(_INTERFACE, "a network interface's name (at most 15 of A-Za-z0-9_.-)"),
    is_optional=True,
)


@frozen
class Backing:
    """One image below a disk's own, never written to."""

    path: Path = field(validator=_PATH)
    format: ImageFormat = field(default="raw", validator=_one_of("raw", "qcow2"))


@frozen
class Disk:
    """A disk image or block device, and how the guest sees it.

    `backing` names the whole chain below `path`, nearest first; a format is never guessed.
    """

    path: Path = field(validator=_PATH)
    format: ImageFormat = field(default="raw", validator=_one_of("raw", "qcow2"))
    readonly: bool = False
    device: DiskDevice = field(
        default="virtio", validator=_one_of("virtio", "scsi", "ide", "cdrom")
    )
    backing: tuple[Backing, ...] = field(
        default=(), validator=_at_most(MAX_BACKING_FILES, "backing files")
    )
    cache: Cache = field(
        default="writeback",
        validator=_one_of("writeback", "none", "writethrough", "directsync", "unsafe"),
    )
    # No io_uring: what is asked for in its rings is done past the jail's filter of system calls.
    aio: Aio = field(default="threads", validator=_one_of("threads", "native"))
    discard: Literal["unmap", "ignore"] = field(
        default="unmap", validator=_one_of("unmap", "ignore")
    )
    detect_zeroes: Literal["off", "on", "unmap"] = field(
        default="off", validator=_one_of("off", "on", "unmap")
    )
    serial: str | None = field(
        default=None,
        # 20 bytes: VIRTIO_BLK_ID_BYTES, and the serial number field of ATA's IDENTIFY DEVICE.
        validator=Rule(
            _matches(_SERIAL, "a serial number (1 to 20 of A-Za-z0-9_.+-)"), is_optional=True
        ),
    )

    @property
    def is_written(self) -> bool:
        """Whether the guest may write to `path`."""
        return not self.readonly and self.device != "cdrom"

    @property
    def is_direct(self) -> bool:
        """Whether its I/O goes past the node's page cache (open(2), O_DIRECT)."""
        return self.cache in ("none", "directsync")

    def __attrs_post_init__(self) -> None:
        _raise_any("disk", self._problems())

    def _problems(self) -> Iterator[Problem]:
        if self.device == "ide" and self.readonly:
            yield Problem("readonly", "an IDE disk can't be read-only: take virtio, scsi or cdrom")
        chain = (self.format, *(image.format for image in self.backing))
        if "raw" in chain[:-1]:
            yield Problem("backing", "a raw image has no backing file: give each format above one")
        paths = [self.path, *(image.path for image in self.backing)]
        if len(set(paths)) < len(paths):
            yield Problem("backing", "an image is named twice in the chain")
        if self.aio == "native" and not self.is_direct:
            yield Problem("aio", "native needs cache none or directsync (O_DIRECT)")
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            yield Problem("detect_zeroes", "unmap needs discard unmap")


@frozen
class Nic:
    """A network card on an existing tap, or on a tap that is made for it and put into a bridge."""

    tap: str | None = field(default=None, validator=_MAYBE_INTERFACE)
    bridge: str | None = field(default=None, validator=_MAYBE_INTERFACE)
    mac: str | None = field(default=None, validator=Rule(_mac_problem, is_optional=True))
    model: NicModel = field(
        default="virtio", validator=_one_of("virtio", "e1000", "e1000e", "rtl8139")
    )
    vhost: bool = False

    def __attrs_post_init__(self) -> None:
        _raise_any("nic", self._problems())

    def _problems(self) -> Iterator[Problem]:
        if (self.tap is None) == (self.bridge is None):
            yield Problem("", "a NIC has either a tap or a bridge")
        if self.vhost and self.model != "virtio":
            yield Problem("vhost", f"vhost serves virtio NICs only, not {self.model}")


@frozen
class Limits:
    """What a machine may take of the node beside its memory; None leaves it to the node.

    The words and ranges of systemd.resource-control(5) and systemd.exec(5): CPUWeight=, CPUQuota=,
    IOWeight=, OOMScoreAdjust=.
    """

    cpu_weight: int | None = field(default=None, validator=_MAYBE_WEIGHT)
    cpu_quota_percent: int | None = field(default=None, validator=_MAYBE_QUOTA)
    io_weight: int | None = field(default=None, validator=_MAYBE_WEIGHT)
    oom_score_adjust: int | None = field(default=None, validator=_MAYBE_OOM_SCORE)


@frozen
class Machine:
    """A virtual machine as somebody defined it: nothing in it depends on a host's QEMU."""

    name: str = field(
        validator=Rule(_matches(_NAME, "a name (1 to 63 of a-z0-9.-, a letter or digit first)"))
    )
    memory_mib: int = field(default=128, validator=_between(1, MAX_MEMORY_MIB))
    hugepages: HugePages | None = field(
        default=None, validator=_one_of(*HUGE_PAGES_MIB, is_optional=True)
    )
    vcpus: int = field(default=1, validator=_between(1, MAX_VCPUS))
    machine: str = field(
        default="pc",
        validator=Rule(
            _matches(MACHINE_TYPE, "pc, q35, microvm or a versioned pc-i440fx-*, pc-q35-*")
        ),
    )
    cpu: str | None = field(default=None, validator=Rule(_cpu_problem, is_optional=True))
    accelerator: Accelerator = field(default="kvm", validator=_one_of("kvm", "tcg", "auto"))
    firmware: Path | None = field(default=None, validator=_MAYBE_PATH)
    kernel: Path | None = field(default=None, validator=_MAYBE_PATH)
    initrd: Path | None = field(default=None, validator=_MAYBE_PATH)
    append: str | None = field(default=None, validator=Rule(_append_problem, is_optional=True))
    disks: tuple[Disk, ...] = field(default=(), validator=_at_most(MAX_DISKS, "disks"))
    nics: tuple[Nic, ...] = field(default=(), validator=_at_most(MAX_NICS, "NICs"))
    serial: bool = True
    limits: Limits = Limits()
    qemu: Path | None = field(default=None, validator=_MAYBE_PATH)

    @property
    def family(self) -> Literal["pc", "q35", "microvm"]:
        """Which board the machine type is a version of."""
        if self.machine == "microvm":
            return "microvm"
        return "q35" if self.machine == "q35" or self.machine.startswith("pc-q35-") else "pc"

    def mac(self, index: int) -> str:
        """The MAC address of a NIC: the given one, else one made of the machine's name.

        So a guest keeps its addresses from start to start with nothing stored.
        """
        return self.nics[index].mac or mac_address(self.name, index)

    def __attrs_post_init__(self) -> None:
        _raise_any("machine", self._problems())

    def _problems(self) -> Iterator[Problem]:
        if self.hugepages is not None and self.memory_mib % HUGE_PAGES_MIB[self.hugepages]:
            yield Problem("memory_mib", f"is no multiple of a huge page ({self.hugepages})")
        for given in ("initrd", "append"):
            if getattr(self, given) is not None and self.kernel is None:
                yield Problem(given, "has no meaning without a kernel")
        if self.cpu == "host" and self.accelerator == "tcg":
            yield Problem("cpu", "host is there under KVM only: take max")
        yield from self._disk_problems()
        yield from self._nic_problems()
        devices = len(self.disks) + len(self.nics)
        if self.family == "microvm" and devices > MAX_MMIO_DEVICES:
            yield Problem("", f"a microvm takes at most {MAX_MMIO_DEVICES} disks and NICs together")

    def _disk_problems(self) -> Iterator[Problem]:
        if self.family == "microvm":
            for index, disk in enumerate(self.disks):
                if disk.device != "virtio":
                    yield Problem(f"disks[{index}].device", "a microvm has virtio disks only")
            return
        ports = IDE_PORTS[self.family]
        if sum(disk.device in ("ide", "cdrom") for disk in self.disks) > ports:
            yield Problem("disks", f"a {self.family} machine has {ports} IDE ports")

    def _nic_problems(self) -> Iterator[Problem]:
        macs: dict[str, int] = {}
        taps: dict[str, int] = {}
        for index, nic in enumerate(self.nics):
            if self.family == "microvm" and nic.model != "virtio":
                yield Problem(f"nics[{index}].model", "a microvm has virtio NICs only")
            other = macs.setdefault(self.mac(index), index)
            if other != index:
                yield Problem(f"nics[{index}].mac", f"is the address of nics[{other}] as well")
            if nic.tap is not None and (other := taps.setdefault(nic.tap, index)) != index:
                yield Problem(f"nics[{index}].tap", f"is the tap of nics[{other}] as well")


def mac_address(name: str, index: int) -> str:
    """The address of a machine's NIC that was given none: QEMU's prefix and 24 bits of a digest."""
    digest = hashlib.sha256(f"{name}/{index}".encode()).digest()
    return ":".join((MAC_PREFIX, *(f"{byte:02x}" for byte in digest[:3])))


def _raise_any(source: str, problems: Iterator[Problem]) -> None:
    found = tuple(problems)
    if found:
        raise SpecError(source, found)

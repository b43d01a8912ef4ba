"""What the QEMU in use can do: found, asked once over QMP, and remembered until it is replaced."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from attrs import evolve, field, frozen

from hypervisor.errors import NotQemu, QemuNotFound, QemuTooOld
from hypervisor.identity import FileIdentity, Memory
from hypervisor.inquiry import Answer, inquire
from hypervisor.machine import MACHINE_TYPE
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed
from kvmsec.linux.files import require_trusted

OLDEST: Final = (7, 0, 0)
DEADLINE_S: Final = 10.0
DEVICES: Final = (
    "e1000",
    "e1000e",
    "ide-cd",
    "ide-hd",
    "rtl8139",
    "scsi-hd",
    "virtio-blk-device",
    "virtio-blk-pci",
    "virtio-net-device",
    "virtio-net-pci",
    "virtio-scsi-pci",
)
"""Every device model that a machine's definition can lead to."""
_SANDBOX_CONTROLS: Final = {"enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"}
_FIXED_PATH: Final = "/usr/libexec/qemu-kvm"
_NAMES: Final = ("qemu-kvm", "kvm", "qemu-system-x86_64")
_DIRECTORIES: Final = (
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
)


@frozen
class Features:
    """What one QEMU program said of itself.

    package: the distributor's name for the build, for people.
    machines: the machine types among those that a definition may name; aliases too.
    devices: those of `DEVICES` that it has.
    accelerators: "kvm" and "tcg", as far as they were built in (/dev/kvm is another question).
    cpus: the CPU models that a definition may name.
    sandbox: it was built with seccomp and knows every control of `-sandbox` that is denied.
    files: the program; empty where it was another one by the time that it had answered.
    """

    version: tuple[int, int, int]
    package: str
    machines: tuple[str, ...]
    devices: tuple[str, ...]
    accelerators: tuple[str, ...]
    cpus: tuple[str, ...]
    sandbox: bool
    files: tuple[FileIdentity, ...] = field(default=(), eq=False, repr=False)

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def find_qemu(option: Path | None, configured: Path | None) -> Path:
    """Which QEMU to use: the option's, else the configuration's, else the first of known names.

    Those are /usr/libexec/qemu-kvm, then qemu-kvm, kvm and qemu-system-x86_64 in the usual
    directories. A `kvm` that is a shell script (as on older systems) is passed over, for what it
    starts could not be confined as a known program. Raises QemuNotFound.
    """
    given = option or configured
    if given is not None:
        if not (given.is_absolute() and given.is_file() and os.access(given, os.X_OK)):
            raise QemuNotFound([str(given)])
        return given
    for candidate in _candidates():
        if _is_elf(candidate):
            return Path(candidate)
    raise QemuNotFound([_FIXED_PATH, *_NAMES])


def _candidates() -> Iterator[str]:
    """The first program of each name, whatever kind of program it is."""
    for places in ((_FIXED_PATH,), *map(_places_of, _NAMES)):
        found = next(filter(_is_executable, places), None)
        if found is not None:
            yield found


def _places_of(name: str) -> Iterator[str]:
    return (f"{directory}/{name}" for directory in _DIRECTORIES)


def _is_executable(path: str) -> bool:
    return os.access(path, os.X_OK) and not os.path.isdir(path)


def _is_elf(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def probe(
    binary: Path,
    *,
    credentials: Credentials | None,
    cache: Path | None = None,
    timeout_s: float = DEADLINE_S,
) -> Features:
    """Ask a QEMU what it can do, or recall it when the same file was asked before.

    It runs as `credentials` (None: as the caller, who isn't root then) with no network, and is
    given `timeout_s` seconds. `cache` is a directory for root's answers.

    Raises UntrustedPath when root is asked to use a program that others may change, NotQemu (with
    what the program said) and QemuTooOld.
    """
    if credentials is not None:
        require_trusted(binary)
    identity = _identify(binary)
    memory = Memory(cache) if cache is not None else None
    key = f"features 2 {binary}"
    if memory is not None and (known := memory.recall(key, Features)) is not None:
        return known
    features = _understand(binary, _ask(binary, credentials, timeout_s), timeout_s)
    if identity == _identify(binary):
        features = evolve(features, files=(identity,))
    if memory is not None:
        memory.keep(key, features)
    return features


def _identify(binary: Path) -> FileIdentity:
    try:
        return FileIdentity.of(binary)
    except FileNotFoundError as error:
        raise QemuNotFound([str(binary)]) from error


def _ask(binary: Path, credentials: Credentials | None, timeout_s: float) -> Answer:
    arguments = (
        *("-S", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"),
        # One after the other until one works: a build may lack any of them.
        *("-accel", "tcg", "-accel", "qtest", "-accel", "kvm"),
        *("-qmp", "stdio"),
    )
    question = b"\n".join(msgspec.json.encode(command) for command in _commands())
    try:
        return inquire(
            [str(binary), *arguments],
            credentials=credentials,
            timeout_s=timeout_s,
            input=question + b"\n",
        )
    except ChildFailed as error:
        if error.kind in ("PermissionError", "FileNotFoundError", "OSError"):
            raise NotQemu(binary, f"can't be executed: {error.detail}") from error
        raise


def _commands() -> Iterator[dict[str, object]]:
    yield {"execute": "qmp_capabilities"}
    yield {"execute": "query-machines", "id": "machines"}
    yield {"execute": "query-cpu-definitions", "id": "cpus"}
    yield {"execute": "query-command-line-options", "id": "options"}
    for name in (*DEVICES, "kvm-accel", "tcg-accel"):
        yield {"execute": "qom-list-types", "arguments": {"implements": name}, "id": name}
    yield {"execute": "quit"}


def _understand(binary: Path, answer: Answer, timeout_s: float) -> Features:
    lines = list(_json_lines(answer.stdout))
    greeting = lines[0].get("QMP") if lines else None
    if greeting is None:
        if answer.status is None:
            raise NotQemu(binary, f"did not answer as QEMU within {timeout_s:g} s", answer.words)
        raise NotQemu(binary, f"ended with status {answer.status} as no QEMU does", answer.words)
    try:
        version = _version(greeting)
        if version < OLDEST:
            raise QemuTooOld(binary, _dotted(version), _dotted(OLDEST))
        replies = {
            line["id"]: line["return"] for line in lines if "id" in line and "return" in line
        }
        return _features(version, str(greeting["version"]["package"]), replies)
    except (LookupError, TypeError, ValueError) as error:
        if answer.status is None:
            raise NotQemu(binary, f"did not answer within {timeout_s:g} s", answer.words) from error
        raise NotQemu(binary, f"gave an answer of no use ({error!r})", answer.words) from error


def _json_lines(output: bytes) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            return


def _version(greeting: dict[str, Any]) -> tuple[int, int, int]:
    numbers = greeting["version"]["qemu"]
    return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])


def _features(version: tuple[int, int, int], package: str, replies: dict[str, Any]) -> Features:
    parameters = {
        option["option"]: {parameter["name"] for parameter in option["parameters"]}
        for option in replies["options"]
    }
    return Features(
        version=version,
        package=package,
        machines=tuple(sorted(set(_machine_types(replies["machines"])))),
        devices=tuple(name for name in DEVICES if replies[name]),
        accelerators=tuple(name for name in ("kvm", "tcg") if replies[f"{name}-accel"]),
        cpus=tuple(sorted(cpu["name"] for cpu in replies["cpus"])),
        sandbox=parameters.get("sandbox", set()) >= _SANDBOX_CONTROLS,
    )


def _machine_types(machines: Iterable[dict[str, Any]]) -> Iterator[str]:
    for machine in machines:
        for name in (machine["name"], machine.get("alias")):
            if isinstance(name, str) and MACHINE_TYPE.fullmatch(name):
                yield name


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))

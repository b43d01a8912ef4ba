"""What an order of another node may name: decided from the node's `[remote]` and what paths are.

Whoever orders over the network is a master candidate, and may be a taken-over one. A path that it
names is followed through its links, every directory on the way must be root's alone (so that
nobody can change it between this look and the start), and what it leads to must lie in a folder
that this node's root has listed.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from hypervisor.foreign_text import escaped
from hypervisor.machine import Machine
from kvmsec.config import RemoteSettings
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import UntrustedPath
from kvmsec.linux.files import require_trusted

_MAX_LINKS: Final = 40  # The kernel's own bound, path_resolution(7).


class RemoteOrderRefused(KvmsecError):
    """A remote order names what this node lets none name; `problems` has all of it."""

    def __init__(self, name: str, problems: tuple[str, ...]) -> None:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(
            f"this node lets no remote order start {name} as it is defined:{listed}",
            hint="list what may be named in [remote] of kvmsec.toml on that node, or start it "
            "there, as root",
        )
        self.problems = problems


class Unfollowable(Exception):
    """A path leads to nothing, or to what others than root could change; says which."""


@frozen
class Place:
    """Where a path leads: the entry that it names, its links followed, and what that is.

    `named_in` is the directory of the path itself, before its last part is followed.
    """

    path: Path
    named_in: Path
    is_block_device: bool = False


Follow = Callable[[Path], Place]


def follow(path: Path) -> Place:
    """Follow a path through all its links. Raises Unfollowable."""
    try:
        named_in = Path(os.path.realpath(path.parent, strict=True))
        here = path
        for _ in range(_MAX_LINKS):
            require_trusted(here.parent)
            entry = Path(os.path.realpath(here.parent, strict=True)) / here.name
            status = entry.lstat()
            if not stat.S_ISLNK(status.st_mode):
                return Place(entry, named_in, stat.S_ISBLK(status.st_mode))
            here = entry.parent / os.readlink(entry)
            if here.name == "..":
                break  # A directory, which is nothing that an order names.
    except UntrustedPath as error:
        raise Unfollowable(error.message) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unfollowable(f"it can't be followed: {reason}") from error
    raise Unfollowable("it leads to no file")


def require_allowed(
    machine: Machine, settings: RemoteSettings, *, security_domain: str | None = None
) -> None:
    """Hold an instance that was ordered over the network to `[remote]`.

    Raises RemoteOrderRefused with every problem there is.
    """
    problems = (
        *find_problems(machine, settings, follow),
        *find_domain_problems(security_domain, settings),
    )
    if problems:
        raise RemoteOrderRefused(machine.name, problems)


def find_problems(machine: Machine, settings: RemoteSettings, follow: Follow) -> Iterator[str]:
    """What in a machine no remote order may name; `follow` says where a path leads."""
    yield from _in_folders(_files(machine), settings, follow)
    # As it is written: that nobody else can change the program is looked at before each start.
    if machine.qemu is not None and machine.qemu not in settings.qemu_programs:
        yield f"qemu: {_shown(machine.qemu)} is not in remote.qemu_programs"
    for index, nic in enumerate(machine.nics):
        if nic.bridge is not None and nic.bridge not in settings.bridges:
            yield f"nics[{index}].bridge: {nic.bridge} is not in remote.bridges"
        if nic.tap is not None and nic.tap not in settings.taps:
            yield f"nics[{index}].tap: {nic.tap} is not in remote.taps"


def find_domain_problems(domain: str | None, settings: RemoteSettings) -> Iterator[str]:
    """What in a security domain no remote order may name.

    Whoever is one is cut off the network while the instance runs, and shares its fate with it: that
    is not for another node to do to a user of this one.
    """
    if domain is not None and domain not in settings.security_domains:
        yield (
            f"security_domain: {escaped(domain, limit_chars=300)} is not in remote.security_domains"
        )


@frozen
class _File:
    key: str
    path: Path
    setting: str
    """Which of the settings has the folders that it may lie in."""


def _files(machine: Machine) -> Iterator[_File]:
    for key in ("firmware", "kernel", "initrd"):
        path: Path | None = getattr(machine, key)
        if path is not None:
            yield _File(key, path, "firmware_folders" if key == "firmware" else "kernel_folders")
    for index, disk in enumerate(machine.disks):
        yield _File(f"disks[{index}].path", disk.path, "disk_folders")
        for below, image in enumerate(disk.backing):
            yield _File(f"disks[{index}].backing[{below}].path", image.path, "disk_folders")


def _in_folders(files: Iterator[_File], settings: RemoteSettings, follow: Follow) -> Iterator[str]:
    for file in files:
        folders: tuple[Path, ...] = getattr(settings, file.setting)
        if problem := _problem_of(file, folders, follow):
            yield f"{file.key}: {_shown(file.path)} {problem}"


def _problem_of(file: _File, folders: tuple[Path, ...], follow: Follow) -> str | None:
    if not folders:
        return f"may not be named: remote.{file.setting} is empty"
    if ".." in file.path.parts:
        return "holds .."
    outside = f"lies in none of remote.{file.setting}"
    # By its text first, so that nobody learns which other files this node has.
    if not any(_is_below(file.path, folder) for folder in folders):
        return outside
    try:
        place = follow(file.path)
    except Unfollowable as error:
        return f"is refused: {error}"
    known = [path for folder in folders if (path := _followed(folder, follow)) is not None]
    if any(_is_below(place.path, folder) for folder in known):
        return None
    # A volume of LVM is a link to its device, put there by root: nobody else can write there.
    is_volume = place.is_block_device and file.setting == "disk_folders"
    if is_volume and any(place.named_in.is_relative_to(folder) for folder in known):
        return None
    return f"leads to {_shown(place.path)}, which {outside}"


def _followed(folder: Path, follow: Follow) -> Path | None:
    try:
        return follow(folder).path
    except Unfollowable:
        return None


def _is_below(path: Path, folder: Path) -> bool:
    return path != folder and path.is_relative_to(folder)


def _shown(path: Path) -> str:
    return escaped(str(path), limit_chars=300)

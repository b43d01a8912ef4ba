"""The checkout as a disk: a tar, as it lies on it, padded to whole sectors."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_LEFT_OUT = {".git", ".venv", "dist", "build", "__pycache__"}
_SECTOR = 512


def write_disk(checkout: Path, others: Iterable[Path], disk: Path) -> None:
    """Write the checkout and, at its top, other files: all of them root's."""
    with tarfile.open(disk, "w") as archive:
        for path in sorted(_files(checkout)):
            archive.add(path, path.relative_to(checkout), recursive=False, filter=_of_root)
        for path in others:
            archive.add(path, path.name, filter=_of_root)
    os.truncate(disk, -(-disk.stat().st_size // _SECTOR) * _SECTOR)


def _files(checkout: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(checkout):
        folders[:] = [one for one in folders if one not in _LEFT_OUT and "_cache" not in one]
        yield from (Path(folder, name) for name in names)


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member

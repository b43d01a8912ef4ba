"""Which processes are QEMUs: by the file that they run, not by what they call themselves."""

import os
import re
from typing import Final

from kvmsec.audit.process_files import ProcessFiles, ProcessGone, TooMuch
from kvmsec.linux.processes import pids

_DELETED: Final = " (deleted)"
_QEMU: Final = re.compile(r"(qemu-system-[\w.+-]+|qemu-kvm|kvm|qemu-dm)", re.ASCII)
# What a process may call itself whose file can't be seen: a kernel cuts names at 15 bytes.
_COMM: Final = re.compile(rb"(qemu-system-[\w.+-]*|qemu-kvm|kvm)\n?", re.ASCII)


def find_qemus() -> list[int]:
    """The pids of all QEMU processes that can be seen, those in containers too; sorted."""
    found = []
    for pid in pids():
        try:
            with ProcessFiles(pid) as files:
                if is_qemu(files):
                    found.append(pid)
        except (ProcessGone, OSError, TooMuch):
            continue
    return sorted(found)


def is_qemu(files: ProcessFiles) -> bool:
    """Whether it runs a QEMU; one whose file may not be looked at is taken at its word.

    Raises OSError.
    """
    try:
        name, _ = executable_of(files)
    except PermissionError:
        return _COMM.fullmatch(files.read("comm", 64)) is not None
    return _QEMU.fullmatch(os.path.basename(name)) is not None


def executable_of(files: ProcessFiles) -> tuple[str, bool]:
    """The path of the file that it runs, and whether that was deleted or replaced since.

    By the kernel's word alone: to look at the file could wait for a filesystem of the process's
    own. Raises OSError; a kernel thread has none (FileNotFoundError).
    """
    target = files.link("exe")
    return target.removesuffix(_DELETED), target.endswith(_DELETED)

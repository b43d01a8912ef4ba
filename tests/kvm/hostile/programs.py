"""Programs in QEMU's place, built where others can execute them and nobody else may change them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hypervisor.features import find_qemu

_HERE: Final = Path(__file__).parent
_OTHER_NAMES: Final = ("exits", "never-answers", "talks", "greets-only", "too-old")


@contextmanager
def stand_ins() -> Iterator[Path]:
    """A directory with `qemu` (see stand_in.c), its other names, and `taken-over` (taken_over.c).

    Where everybody can reach it, since a program is first asked as nobody what it can do.
    """
    folder = Path(tempfile.mkdtemp(prefix="stand-ins-", dir="/var/lib"))
    try:
        folder.chmod(0o755)
        _build("stand_in.c", folder / "qemu")
        _build("taken_over.c", folder / "taken-over")
        for name in _OTHER_NAMES:
            os.link(folder / "qemu", folder / name)
        yield folder
    finally:
        shutil.rmtree(folder)


def _build(source: str, program: Path) -> None:
    real = f'-DQEMU="{find_qemu(None, None)}"'
    flags = ("-static", "-O1", "-Wall", "-Wno-return-type", "-Werror")
    subprocess.run(["gcc", *flags, real, _HERE / source, "-o", program], check=True)

"""Where the tiny guest is: firmware of 64 KiB that proves that an accelerator runs a guest.

Its source and its protocol are in `vm-images/tiny`; a test rebuilds the bytes that ship.
"""

from importlib.resources import files
from pathlib import Path

BANNER = b"KVMSEC-TINY up"
"""How its first line on the serial port begins."""


def rom_path() -> Path:
    """The ROM's path, for `-bios`; raises FileNotFoundError where the package is no directory."""
    rom = Path(str(files("hypervisor") / "data" / "tiny.rom"))
    if not rom.is_file():
        raise FileNotFoundError(f"{rom} is missing: install kvmsec unpacked, by pip")
    return rom

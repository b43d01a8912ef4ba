"""The files that a machine boots from, opened by root on somebody's word."""

import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from hypervisor.machine import Machine
from kvmsec.node.boot_files import BootFileRefused, open_all

pytestmark = pytest.mark.root


def test_no_driver_is_asked_about_a_device() -> None:
    """To open a watchdog is to start it; this one's driver is not there, so that it would tell."""
    device = Path("/run/no-driver")
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(511, 77))
    try:
        with ExitStack() as opened, pytest.raises(BootFileRefused, match="not a regular file"):
            open_all(Machine(name="web", kernel=device), opened)
    finally:
        device.unlink()

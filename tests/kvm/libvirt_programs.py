"""libvirt's daemons for QEMU, where its packages are installed."""

import shutil
from typing import Final

# The one that serves QEMU alone, or the one for all drivers.
DAEMON: Final = shutil.which("virtqemud") or shutil.which("libvirtd")
# It writes domains' output to files; the other asks for it at each start.
LOG_DAEMON: Final = shutil.which("virtlogd")
IS_INSTALLED: Final = None not in (DAEMON, LOG_DAEMON, shutil.which("virsh"))

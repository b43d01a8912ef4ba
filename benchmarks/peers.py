"""The peers: Debian's own packages, unpacked beside the checkout and never installed.

They are laid over /usr in a mount namespace of a worker, a process of Debian's Python that drives
one peer and takes the times by itself; the host, and what it is compared with, never see them.
"""

import re
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from benchmarks.worker import Worker, running

_CHECKOUT: Final = Path(__file__).resolve().parents[1]
TREE: Final = _CHECKOUT / ".venv" / "peers"

LIBVIRT: Final = (
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "python3-libvirt",
)
# What Ganeti's `utils` imports; its own dependencies would be a whole cluster's.
GANETI: Final = (
    *("python3-openssl", "python3-pyparsing", "python3-simplejson", "python3-pycurl"),
    *("python3-bitarray", "python3-psutil", "procps"),
)
PYTHON: Final = "/usr/bin/python3"


class PeersNotInstalled(Exception):
    """apt-get could not fetch the packages."""


def install() -> None:
    """Fetch what the host lacks of them and unpack it; without network, PeersNotInstalled."""
    with tempfile.TemporaryDirectory() as place:
        packages = [*_lacking(*LIBVIRT, *GANETI), _ganeti_package()]
        _run("apt-get", "-qq", "-o", "APT::Sandbox::User=", "download", *packages, cwd=place)
        fresh = TREE.with_name("peers.new")
        shutil.rmtree(fresh, ignore_errors=True)
        for package in sorted(Path(place).glob("*.deb")):
            _run("dpkg-deb", "-x", str(package), str(fresh), cwd=place)
        if (old := fresh / "lib").exists():  # A link to usr/lib on the host.
            shutil.copytree(old, fresh / "usr" / "lib", symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(TREE, ignore_errors=True)
    fresh.rename(TREE)
    print(f"unpacked below {TREE}: {', '.join(packages)}")


def _lacking(*packages: str) -> list[str]:
    """Those packages and all that they need and the host doesn't have."""
    said = _run("apt-get", "-s", "-q", "install", "--no-install-recommends", *packages, cwd="/")
    # `Inst name [installed version] (new version …)`: without the brackets it is new here.
    return re.findall(r"^Inst (\S+) \(", said, re.MULTILINE)


def _ganeti_package() -> str:
    found = _run("apt-cache", "search", "--names-only", r"^ganeti-3\.[0-9]+$", cwd="/").split()
    if not found:
        raise PeersNotInstalled("apt knows no ganeti-3.N: apt-get update, on Debian 12 or 13")
    return found[0]


def _run(*argv: str, cwd: str) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeersNotInstalled(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def lacks_libvirt() -> str | None:
    """Why libvirt can't be measured here, or None."""
    return _lacks("libvirt", "usr/sbin/libvirtd")


def lacks_ganeti() -> str | None:
    return _lacks("Ganeti's uidpool.py", "usr/share/ganeti")


def _lacks(peer: str, path: str) -> str | None:
    if (TREE / path).exists():
        return None
    return f"{peer}, which isn't installed (./dev bench --install-peers)"


def worker(script: str, *arguments: str) -> AbstractContextManager[Worker]:
    """A worker with the peers' tree over /usr, in a mount namespace of its own."""
    argv = ["unshare", "--mount", "--", "sh", "-c"]
    argv += ['mount -t overlay peers -o "lowerdir=$0/usr:/usr" /usr && exec "$@"', str(TREE)]
    argv += [PYTHON, str(_CHECKOUT / "benchmarks" / "workers" / script), *arguments]
    return running(argv)

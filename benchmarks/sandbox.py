"""Namespaces to work in, so that a benchmark leaves nothing on the host."""

import os
import shutil
import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
_PRIVATE = ("/run", "/var/lib", "/var/log", "/tmp", "/var/tmp", "/dev/shm")


def command_inside(*argv: str) -> list[str]:
    """The command line of a program in mount, network, IPC, UTS and PID namespaces of its own."""
    namespaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--mount-proc"]
    # The shell is the namespace's init: it collects what orphans leave, as an init does.
    as_init = ["sh", "-c", '"$@"; exit $?', "sh"]
    return ["unshare", *namespaces, "--kill-child", "--", *as_init, sys.executable, *argv]


def furnish() -> None:
    """Make the changeable parts of the host private: a copy of /etc, empty places for the rest."""
    # Imported before anything is hidden.
    from kvmsec.linux import command, namespaces

    def run(*argv: str) -> None:
        command.run(argv, timeout_s=30)

    kept = {path: os.open(path, os.O_PATH) for path in (_CHECKOUT, Path(sys.prefix))}
    run("mount", "-t", "tmpfs", "-o", "mode=755", "etc", "/mnt")
    shutil.copytree("/etc", "/mnt", symlinks=True, dirs_exist_ok=True)
    run("mount", "--move", "/mnt", "/etc")
    for place in _PRIVATE:
        if not Path(place).is_dir():
            continue
        mode = "1777" if "tmp" in place or "shm" in place else "755"
        run("mount", "-t", "tmpfs", "-o", f"mode={mode},size=75%", "private", place)
    Path("/run/lock").mkdir(exist_ok=True)
    run("ip", "link", "set", "lo", "up")
    for path, descriptor in kept.items():
        if not path.exists():  # A checkout below /tmp; what else is there would be swept each time.
            path.mkdir(parents=True)
            source = f"/proc/self/fd/{descriptor}"
            namespaces.mount(source, str(path), None, namespaces.MS_BIND)
        os.close(descriptor)
    os.chdir(_CHECKOUT)

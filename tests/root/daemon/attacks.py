"""What code that took the front over would try: each returns what it got, or raises OSError."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvmsec.linux import namespaces, syscalls

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PTRACE_ATTACH: Final = 16
_VICTIM: Final = "KVMSEC_TEST_VICTIM"


def read_accounts() -> object:
    return Path("/etc/passwd").read_text()


def read_key() -> object:
    return Path("/var/lib/kvmsec/server.key").read_text()


def list_files() -> object:
    return os.listdir("/etc")


def list_processes() -> object:
    return os.listdir("/proc/1")


def write_file() -> object:
    return Path("/var/tmp/kvmsec-attack").write_text("x")


def write_into_tree() -> object:
    return Path("/file").write_text("x")


def signal_root() -> object:
    os.kill(int(os.environ[_VICTIM]), 0)
    return True


def trace_root() -> object:
    if _libc.ptrace(_PTRACE_ATTACH, int(os.environ[_VICTIM]), None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    return True


def execute() -> object:
    return subprocess.run(["/bin/true"], check=True).returncode


def execute_itself() -> object:
    """In a fork's place, for who can't fork: gone where it succeeds."""
    os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"])


def fork() -> object:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def start_thread() -> object:
    try:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    except RuntimeError as error:
        raise OSError(1, str(error)) from error
    return True


def open_namespace() -> object:
    syscalls.unshare(namespaces.CLONE_NEWNS)
    return True


def open_user_namespace() -> object:
    syscalls.unshare(namespaces.CLONE_NEWUSER)
    return True


def mount() -> object:
    namespaces.mount("x", "/proc", "tmpfs", 0)
    return True


def become_root() -> object:
    os.setresuid(0, 0, 0)
    return os.getuid() == 0


def become_somebody() -> object:
    os.setresuid(247001, 247001, 247001)
    return True


def connect_to_node() -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/kvmsec/node.sock")
    return True


def connect_to_abstract_socket() -> object:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0kvmsec-test")
    return True


def connect_by_tcp() -> object:
    with socket.socket(socket.AF_INET) as client:
        client.connect(("127.0.0.1", int(os.environ["KVMSEC_TEST_PORT"])))
    return True


def listen_on_a_port() -> object:
    with socket.socket(socket.AF_INET) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
    return True


def packet_socket() -> object:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    return True


def netlink_socket() -> object:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    return True


def linger() -> object:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\1\0\0\0")
    return True


def trace_itself_back_to_the_node() -> object:
    return os.listdir("/proc/self/fd/../../../etc/../etc")[0]


def end_root() -> object:
    os.kill(int(os.environ[_VICTIM]), signal.SIGCONT)
    return True


ATTACKS: Final[tuple[Callable[[], object], ...]] = (
    *(read_accounts, read_key, list_files, list_processes, write_file, write_into_tree),
    *(signal_root, end_root, trace_root, execute, fork, start_thread),
    *(open_namespace, open_user_namespace, mount, become_root, become_somebody),
    *(connect_to_node, connect_to_abstract_socket, connect_by_tcp, listen_on_a_port),
    *(packet_socket, netlink_socket, linger, trace_itself_back_to_the_node),
)
COURIER_MAY: Final = frozenset({"connect_by_tcp"})

"""The two ways to nft: libnftables.so.1 in process, or the `nft` command where it is missing.

A context is made for each call and freed after it: its netlink socket stays in the network
namespace that the caller had when it was opened, and a context is no thing to share by threads.
"""

import ctypes
import functools
import socket
from typing import Final, Protocol

from firewall.errors import FirewallError
from kvmsec.linux import command
from kvmsec.linux.errors import CommandFailed, CommandTimedOut

_LIBRARY: Final = "libnftables.so.1"
_DEADLINE_S: Final = 20.0
NETLINK_NETFILTER: Final = 12  # linux/netlink.h

# nftables/libnftables.h, enum nft_ctx_output_flags.
_STATELESS: Final = 1 << 2
_JSON: Final = 1 << 4
_TERSE: Final = 1 << 11


class NftFailed(FirewallError):
    """nft refused a command; `detail` is what it said."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"nft: {detail}")
        self.detail = detail

    @property
    def is_missing_object(self) -> bool:
        """Whether the table (or set, or counter) simply isn't there."""
        return "No such file or directory" in self.detail


class Nft(Protocol):
    """What kvmsec asks of nft. Every call raises NftFailed."""

    def change(self, commands: str) -> None:
        """Carry the commands out in one transaction, or none of them."""

    def check(self, commands: str) -> None:
        """Have the kernel judge the commands as a transaction that is then given up."""

    def list_json(self, what: str) -> str:
        """The JSON of `list what`, with elements and counters."""

    def list_structure(self, what: str) -> str:
        """The text of `list what` without elements, counters and handles."""


class Library:
    """libnftables in this process (libnftables(3))."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def change(self, commands: str) -> None:
        self._run(commands)

    def check(self, commands: str) -> None:
        self._run(commands, is_dry=True)

    def list_json(self, what: str) -> str:
        return self._run(f"list {what}", _JSON)

    def list_structure(self, what: str) -> str:
        return self._run(f"list {what}", _STATELESS | _TERSE)

    def _run(self, commands: str, flags: int = 0, *, is_dry: bool = False) -> str:
        nft = self._library
        _require_netlink()
        context = nft.nft_ctx_new(0)
        if not context:
            raise NftFailed("no context could be made (out of memory?)")
        try:
            nft.nft_ctx_buffer_output(context)
            nft.nft_ctx_buffer_error(context)
            nft.nft_ctx_output_set_flags(context, flags)
            nft.nft_ctx_set_dry_run(context, is_dry)
            status = nft.nft_run_cmd_from_buffer(context, commands.encode())
            if status:
                raise NftFailed(_words(nft.nft_ctx_get_error_buffer(context)))
            return _text(nft.nft_ctx_get_output_buffer(context))
        finally:
            nft.nft_ctx_free(context)


def _require_netlink() -> None:
    """libnftables ends the whole process where the kernel has no netfilter netlink."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
    except OSError as error:
        raise NftFailed(f"no netlink socket to netfilter: {error.strerror}") from error


class Command:
    """The `nft` command, a process for each call."""

    def change(self, commands: str) -> None:
        _nft("-f", "-", commands=commands)

    def check(self, commands: str) -> None:
        _nft("-c", "-f", "-", commands=commands)

    def list_json(self, what: str) -> str:
        return _nft("-j", "list", *what.split())

    def list_structure(self, what: str) -> str:
        return _nft("-s", "-t", "list", *what.split())


def _nft(*arguments: str, commands: str = "") -> str:
    try:
        done = command.run(["nft", *arguments], input=commands.encode(), timeout_s=_DEADLINE_S)
    except CommandFailed as error:
        raise NftFailed(_words(error.stderr)) from error
    except CommandTimedOut as error:
        raise NftFailed(error.message) from error
    except FileNotFoundError as error:
        raise NftFailed("neither libnftables.so.1 nor the nft command is there") from error
    return _text(done.stdout)


def _text(buffer: bytes | None) -> str:
    return (buffer or b"").decode(errors="replace")


def _words(buffer: bytes | None) -> str:
    """The first error, without the command that it quotes and underlines."""
    lines = [line for line in _text(buffer).splitlines() if "Error:" in line or "error:" in line]
    text = lines[0] if lines else _text(buffer)
    _, _, said = text.partition("rror: ")
    return (said or text).strip() or "it failed without a word"


@functools.cache
def load_library() -> Library | None:
    """libnftables with its prototypes, or None where the host has none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name, result in (
        ("nft_ctx_buffer_output", ctypes.c_int),
        ("nft_ctx_buffer_error", ctypes.c_int),
        ("nft_ctx_get_output_buffer", ctypes.c_char_p),
        ("nft_ctx_get_error_buffer", ctypes.c_char_p),
        ("nft_ctx_free", None),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_run_cmd_from_buffer.restype = ctypes.c_int
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    return Library(library)

"""What the process that becomes QEMU does until then, and what it and its launcher say.

The two talk over channels of the child's own. On the line, a socket, the child says first of all
that it is there, then is told its cell, then its jail and its command line, and at last to go. On
the report, a pipe, it says what failed; that closes as the child becomes QEMU.
"""

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Collection
from functools import cache
from typing import Final, NoReturn

import msgspec
from attrs import evolve, frozen

from hypervisor.errors import JailFailed
from hypervisor.jail import (
    Cell,
    Jail,
    duplicate_above,
    enter,
    enter_cell,
    execute,
    make_namespaces,
)
from kvmsec.linux import children, passing, syscalls
from kvmsec.linux.readiness import has_left

BORN: Final = b"b"
"""What a child says first of all: that it is there."""
DESCRIPTORS: Final = b"d"
"""That descriptors come with this, for what is said next."""
GO: Final = b"g"
EXECUTING: Final = b"x"
"""What a child says last of all: its jail stands."""
ALONE: Final = 125
"""The exit status of a child, or a spare, whose launcher is gone."""
MOST_AT_ONCE: Final = 253
"""Of descriptors: SCM_MAX_FD, linux/include/net/scm.h."""
LIMIT_BYTES: Final = 1 << 18
"""Of what is said: the kernel's own is less, unless net.core.wmem_default was raised."""


@frozen
class Order:
    """What a child is to become; `held` are the numbers of the descriptors that come with it."""

    jail: Jail
    program: str
    argv: tuple[str, ...]
    held: tuple[int, ...]


@frozen
class Ends:
    """The child's ends of the channels to its launcher."""

    line: socket.socket
    report: int

    def close(self) -> None:
        """Close them in a process that isn't the child."""
        self.line.close()
        os.close(self.report)

    def tell(self, failure: JailFailed) -> None:
        """Say what failed, to whoever waits for the child to become QEMU."""
        # A path may be no text.
        said = failure.detail[:1024].encode(errors="backslashreplace").decode()
        told = {"step": failure.step, "errno": failure.errno, "detail": said}
        with contextlib.suppress(BrokenPipeError):
            os.write(self.report, msgspec.json.encode(told))


@frozen
class Origin:
    """What a child goes on from: a pidfd of that, and where it tells that the child is there."""

    pidfd: int
    tell: int

    def hold(self) -> set[int]:
        return {self.pidfd, self.tell}

    def close(self) -> None:
        for descriptor in self.hold():
            os.close(descriptor)


@cache
def _cell_decoder() -> msgspec.msgpack.Decoder[Cell]:
    return msgspec.msgpack.Decoder(Cell)


@cache
def _order_decoder() -> msgspec.msgpack.Decoder[Order]:
    return msgspec.msgpack.Decoder(Order)


def prepare_decoders() -> None:
    """Make what reads a cell and an order, which takes a fifth of a millisecond for each."""
    _cell_decoder()
    _order_decoder()


def live(ends: Ends, lacking: int = 0, origin: Origin | None = None) -> NoReturn:
    """The child's whole life as Python; it must never return into the code that forked it.

    lacking: the kinds of namespaces that it was to be born in, and was not. origin: what it came
    from, which is the launcher's to end.
    """
    try:
        try:
            if lacking:
                make_namespaces(lacking)
            line = ends.line.fileno()
            held = origin.hold() if origin else set()
            children.close_all_but({0, 1, 2, line, ends.report, *held})
            _end_with_launcher(line)
            _say_that_it_lives(ends.line, origin)
            _enter_cell(ends.line)
            order = _receive_order(ends.line)
            # Above every number that the jail hands out, so that neither is overwritten.
            above = max(order.jail.descriptors, default=2) + 1
            ends = evolve(ends, report=duplicate_above(ends.report, above))
            _become(order, duplicate_above(line, above), ends.report)
        except ConnectionError:
            os._exit(ALONE)
        except JailFailed as error:
            ends.tell(error)
        except OSError as error:
            ends.tell(JailFailed("exec", error.errno or 0, str(error)))
        except BaseException as error:
            ends.tell(JailFailed("jail", 0, repr(error)))
    finally:
        os._exit(126)


def _end_with_launcher(line: int) -> None:
    """Be ended as soon as the launcher is; said again whenever ids change, which undoes it.

    Once its launcher is gone another command may clean the uid and lease it anew: the child must
    not take it after that.
    """
    syscalls.end_with_parent()
    _require_signal_at_launchers_end(signal.SIGKILL)
    if has_left(line):  # It was gone before; the first process of a namespace sees no parent.
        os._exit(ALONE)


def _require_signal_at_launchers_end(wanted: int) -> None:
    if (found := syscalls.signal_at_parents_end()) != wanted:
        detail = f"the signal at its launcher's end is {found}, wanted {int(wanted)}"
        raise JailFailed("launcher's end", 0, detail)


def _say_that_it_lives(line: socket.socket, origin: Origin | None) -> None:
    """By a descriptor of this very process: its pid here is another than the launcher's for it."""
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(line, [BORN], [pidfd] if origin is None else [pidfd, origin.pidfd])
    os.close(pidfd)
    if origin is not None:
        with contextlib.suppress(BrokenPipeError):  # The nursery is gone.
            os.write(origin.tell, BORN)
        origin.close()


def _enter_cell(line: socket.socket) -> None:
    said, received = _hear(line)
    _require_all(received, 1)
    (tree,) = received
    enter_cell(evolve(_cell_decoder().decode(said), tree=tree))
    os.close(tree)


def _receive_order(line: socket.socket) -> Order:
    """What the launcher wants, with the descriptors by the numbers that they have here."""
    said, received = _hear(line)
    order = _order_decoder().decode(said)
    _require_all(received, len(order.held))
    jail = order.jail.renumbered(dict(zip(order.held, received, strict=True)))
    return evolve(order, jail=jail)


def _hear(line: socket.socket) -> tuple[bytes, list[int]]:
    """One thing that the launcher says, and the descriptors that it sent before."""
    received: list[int] = []
    while True:
        said, descriptors = passing.receive(line, LIMIT_BYTES, MOST_AT_ONCE)
        if not said:
            os._exit(ALONE)
        received += descriptors
        if said != DESCRIPTORS:
            return said, received


def _require_all(received: Collection[int], wanted: int) -> None:
    if len(received) < wanted:  # The kernel leaves out what has no number any more.
        detail = f"{wanted} are granted: too many for its limit of open files"
        raise JailFailed("descriptors", errno.EMFILE, detail)


def _become(order: Order, line: int, report: int) -> None:
    _end_with_launcher(line)  # Before it takes the uid, and after.
    enter(order.jail)
    _end_with_launcher(line)
    if os.read(line, len(GO)) != GO:
        os._exit(ALONE)
    syscalls.outlive_parent()
    _require_signal_at_launchers_end(0)
    os.write(report, EXECUTING)
    execute(order.jail, order.program, order.argv)

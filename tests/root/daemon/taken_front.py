"""A front that somebody has taken over: shut in as the real one, it does what it is told.

    python -m tests.root.daemon.taken_front OPTIONS PROGRAM [ARGUMENT]...

is the daemon PROGRAM with such a front. Whoever connects to the node's port tells it in one line of
JSON what to do, and gets one line back. The options, separated by commas: `older-kernel` lets it
send descriptors as before Linux 6.16, where no socket could refuse them; `impatient` waits a second
for what it tells the front.
"""

import json
import os
import runpy
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from attrs import evolve

from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import PROTOCOL
from kvmsec.rpc.frames import Request

_LENGTH: Final = struct.Struct(">I")
_MOST_DESCRIPTORS: Final = 253  # unix(7), SCM_MAX_FD
_NO_FRAMES: Final[dict[str, bytes]] = {
    "garbage": _LENGTH.pack(200) + b"\xc1" * 200,
    "oversized": b"\xff" * 4,
    "another's": _LENGTH.pack(4) + msgspec.msgpack.encode({"a": 1}),
    "deep": _LENGTH.pack(1 << 16) + b"\x91" * (1 << 16),
}


def serve_with_it() -> None:
    """The daemon, whose own part is what it always is."""
    from kvmsec.daemon import confined_child, confined_start, front_keeper

    options, *sys.argv = sys.argv[1:]
    if "older-kernel" in options:
        confined_child.refuse_descriptors = front_keeper.refuse_descriptors = lambda one: None
    if "impatient" in options:
        front_keeper.TRUST = evolve(front_keeper.TRUST, timeout_s=1.0)  # type: ignore[misc]
        front_keeper.STOP = evolve(front_keeper.STOP, timeout_s=1.0)  # type: ignore[misc]
    start = confined_start.Start

    def start_another(**told: Any) -> Any:
        if told["name"] == "kvmsec-front":
            told["program"] = "tests.root.daemon.taken_front"
        return start(**told)

    confined_start.Start = start_another  # type: ignore[misc, assignment]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """The front's whole life, see `kvmsec.daemon.front.main`."""
    from kvmsec.daemon.confined_life import import_all, shut_in
    from kvmsec.daemon.system_calls import front_rules

    import_all()
    control, calls, *listeners = shut_in(front_rules())
    TakenFront(control, calls, listeners).live()


class TakenFront:
    """Takes what it is pushed, as the real one does, until it is told to do something else."""

    def __init__(
        self, control: socket.socket, calls: socket.socket, listeners: list[socket.socket]
    ) -> None:
        self.control = control
        self.calls = calls
        self.listeners = listeners
        self.is_deaf = False

    def live(self) -> None:
        for one in self.listeners:
            one.setblocking(True)
        while True:
            watched = [*self.listeners, *([] if self.is_deaf else [self.control])]
            for one in select.select(watched, [], [])[0]:
                if one is self.control:
                    self._take_push()
                else:
                    self._obey(one.accept()[0])

    def _take_push(self) -> None:
        frame = _frame_from(self.control)
        if frame is None:
            self.is_deaf = True  # Cut off, and not gone for that.
            return
        request = msgspec.msgpack.decode(frame, type=Request)
        body = wire.encode_answer(m.Nothing(), PROTOCOL)
        self.control.sendall(_framed({"id": request.id, "body": body}))

    def _obey(self, master: socket.socket) -> None:
        with master, master.makefile("r") as lines:
            told = json.loads(lines.readline())
            act: Callable[..., Any] = getattr(self, told.pop("do"))
            try:
                answer = ["did", act(**told)]
            except OSError as error:
                answer = ["refused", str(error)]
            master.sendall(json.dumps(answer).encode() + b"\n")

    # What it can be told ------------------------------------------------------------------------

    def be_deaf(self) -> None:
        self.is_deaf = True

    def ask(self, call: str, body: str, caller: Any = None, target: Any = None) -> Any:
        """One well-formed call; its answer as it comes."""
        self.calls.sendall(_request(1, call, body.encode(), caller, target))
        frame = _frame_from(self.calls)
        return None if frame is None else json.loads(msgspec.msgpack.decode(frame)["body"])

    def send_no_frame(self, which: str, to: str) -> None:
        getattr(self, to).sendall(_NO_FRAMES[which])

    def send_half_a_frame(self) -> None:
        self.calls.sendall(_LENGTH.pack(1 << 20) + b"x" * 100)

    def answer_what_nobody_asked(self, times: int, size: int) -> None:
        body = b"x" * size
        for number in range(times):
            self.control.sendall(_framed({"id": number - times // 2, "body": body}))

    def send_descriptors(self, messages: int) -> int:
        """Connections and sockets that hold each other, as many in each message as can be."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _fds(theirs))])
            frame = _request(1, "node.info", b"{}", None, None)
            for number in range(messages):
                to = self.control if number % 2 else self.calls
                whole = frame if to is self.calls else _framed({"id": -1, "body": b""})
                many = _fds(*([theirs, *self.listeners, to] * 100)[:_MOST_DESCRIPTORS])
                sent = to.sendmsg([whole], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
                to.sendall(whole[sent:])
                if to is self.calls:
                    _frame_from(self.calls)
        return messages * _MOST_DESCRIPTORS

    def flood(self, call: str, body: str, caller: Any, seconds: float) -> int:
        """As many calls as go in, none of whose answers is read; how many bytes that were."""
        whole = _request(1, call, body.encode(), caller, None)
        self.calls.setblocking(False)
        left, total = b"", 0
        end = time.monotonic() + seconds
        while (rest_s := end - time.monotonic()) > 0:
            left = left or whole
            if select.select([], [self.calls], [], rest_s)[1]:
                sent = self.calls.send(left)
                left, total = left[sent:], total + sent
        return total

    def spoil_listeners(self, how: str) -> None:
        """What would outlast this process: its successor is given the same sockets."""
        for one in self.listeners:
            if how == "shutdown":
                one.shutdown(socket.SHUT_RDWR)
            elif how == "backlog":
                one.listen(0)
            else:
                drop_all = struct.pack("HBBI", 6, 0, 0, 0)  # BPF_RET | BPF_K, 0: <linux/filter.h>
                one.setsockopt(socket.SOL_SOCKET, 26, _program(drop_all))  # SO_ATTACH_FILTER

    def die(self) -> None:
        os._exit(3)


def _program(instructions: bytes) -> bytes:
    """struct sock_fprog; what it points to is kept for as long as this process lives."""
    import ctypes

    held = ctypes.create_string_buffer(instructions, len(instructions))
    _program.held = held  # type: ignore[attr-defined]
    return struct.pack("HL", len(instructions) // 8, ctypes.addressof(held))


def _fds(*many: socket.socket) -> bytes:
    return struct.pack(f"{len(many)}i", *(one.fileno() for one in many))


def _framed(value: object) -> bytes:
    encoded = msgspec.msgpack.encode(value)
    return _LENGTH.pack(len(encoded)) + encoded


def _request(number: int, call: str, body: bytes, caller: Any, target: Any) -> bytes:
    frame = {"id": number, "call": call, "protocol": PROTOCOL, "body": body}
    return _framed({**frame, "caller": caller, "target": target})


def _frame_from(one: socket.socket) -> bytes | None:
    head = _exactly(one, _LENGTH.size)
    return None if head is None else _exactly(one, *_LENGTH.unpack(head))


def _exactly(one: socket.socket, size: int) -> bytes | None:
    """None at the end of the stream."""
    data = b""
    while len(data) < size:
        more = one.recv(size - len(data))
        if not more:
            return None
        data += more
    return data


if __name__ == "__main__":
    serve_with_it()

"""Reading what packet rules send to a log group, as ulogd does."""

import errno
import socket
import struct
from types import TracebackType
from typing import Final, Self

from attrs import frozen

_NETLINK_NETFILTER: Final = 12
_SO_RCVBUFFORCE: Final = 33  # linux/include/uapi/asm-generic/socket.h
_ROOM_BYTES: Final = 1 << 24


@frozen
class Line:
    """One packet that was logged: the rule's prefix, and the sender's uid."""

    prefix: str
    uid: int


class LogGroup:
    """The receiving end of NFLOG (linux/netfilter/nfnetlink_log.h), in the caller's namespace."""

    def __init__(self, group: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(2)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM_BYTES)
        # NFULNL_CFG_CMD_BIND, then copy no payload, and send after 0.1 s what has come.
        self._configure(group, 1, struct.pack("=B", 1))
        self._configure(group, 2, struct.pack(">IBx", 0, 1))
        self._configure(group, 4, struct.pack(">I", 10))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def _configure(self, group: int, kind: int, value: bytes) -> None:
        attribute = struct.pack("=HH", 4 + len(value), kind) + value
        attribute += b"\0" * (-len(attribute) % 4)
        body = struct.pack(">BBH", 0, 0, group) + attribute
        # NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK
        header = struct.pack("=IHHII", 16 + len(body), 4 << 8 | 1, 5, 1, 0)
        self._socket.send(header + body)
        assert struct.unpack_from("=i", self._socket.recv(4096), 16) == (0,)

    def receive(self, within_s: float = 2) -> list[Line]:
        """The packets that were logged, as far as one message has them; raises TimeoutError.

        The kernel sends several at once.
        """
        self._socket.settimeout(within_s)
        data = self._socket.recv(65536)
        lines = []
        start = 0
        while start + 16 <= len(data):
            size, kind = struct.unpack_from("=IH", data, start)
            if kind == 4 << 8:  # NFULNL_MSG_PACKET
                found = self._attributes(data[start + 20 : start + size])
                prefix = found[10].rstrip(b"\0").decode()
                lines.append(Line(prefix, int.from_bytes(found[11], "big")))
            start += size + (-size % 4)
        return lines

    def receive_all(self, silence_s: float = 1) -> list[Line]:
        """The packets that were logged until none has been for a while.

        What found no room here any more is not among them: see netlink(7), ENOBUFS.
        """
        lines: list[Line] = []
        while True:
            try:
                lines += self.receive(silence_s)
            except TimeoutError:
                return lines
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    @staticmethod
    def _attributes(data: bytes) -> dict[int, bytes]:
        attributes = {}
        offset = 0
        while offset + 4 <= len(data):
            size, kind = struct.unpack_from("=HH", data, offset)
            attributes[kind] = data[offset + 4 : offset + size]
            offset += size + (-size % 4)
        return attributes

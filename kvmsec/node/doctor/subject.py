"""What the checks look at, and how they answer."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Self, TypeVar

from attrs import frozen

from kvmsec.config import Config
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from uidpool.ranges import EMPTY, UidRanges

_T = TypeVar("_T")

Severity = Literal["ok", "warning", "error"]


@frozen
class Answer:
    """One thing that a check found: how bad it is, what it is, and what to do about it."""

    severity: Severity
    message: str
    hint: str | None = None


def ok(message: str) -> Answer:
    return Answer("ok", message)


def warning(message: str, hint: str | None) -> Answer:
    return Answer("warning", message, hint)


def error(message: str, hint: str | None) -> Answer:
    return Answer("error", message, hint)


@frozen
class Subject:
    """This node, and what could be read of it; what could not be is None, and a check's to say."""

    host: Host
    config: Config | None
    cluster: Cluster | None

    @classmethod
    def of(cls, host: Host) -> Self:
        """Read what most checks need, once."""
        return cls(host, _readable(lambda: host.config), _readable(lambda: host.store.load()[0]))

    @property
    def paths(self) -> Paths:
        return self.host.paths

    @property
    def pool(self) -> UidRanges:
        return self.cluster.uid_pool if self.cluster else EMPTY

    @property
    def configured_qemu(self) -> Path | None:
        return self.config.qemu.path if self.config else None


def _readable(read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except (Fault, OSError):
        return None


@frozen
class Check:
    """One question about a node: its stable code, its name for people, and the function."""

    code: str
    item: str
    look: Callable[[Subject], Iterable[Answer]]

"""Headers are read by a child that is nobody and holds descriptors that can't write."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hypervisor.foreign_text import escaped
from hypervisor.images import qcow2
from hypervisor.images.errors import HeaderRefused, InspectionFailed
from hypervisor.images.qcow2 import Malformed, Qcow2Header
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed, ChildTimedOut

_MALFORMED: Final = "malformed"


def read_headers(
    images: Sequence[tuple[Path, int, int]], inspector: Credentials, timeout_s: float
) -> list[Qcow2Header]:
    """Read the headers of qcow2 images (path, descriptor, size in bytes), all in one child.

    Raises HeaderRefused for the first malformed one, and InspectionFailed when the child does not
    answer within `timeout_s` seconds, or otherwise than it should.
    """
    if not images:
        return []
    first = images[0][0]
    descriptors = [fd for _, fd, _ in images]
    try:
        answers = run_in_child(
            lambda: [_inspect(fd, size) for _, fd, size in images],
            what="reading disk headers",
            timeout_s=timeout_s,
            credentials=inspector,
            keep=descriptors,
        )
        return [
            _header_from(path, answer) for (path, _, _), answer in zip(images, answers, strict=True)
        ]
    except (ChildFailed, ChildTimedOut) as error:
        raise InspectionFailed(first, f"(or one behind it) can't be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InspectionFailed(first, "was answered for with something else") from error


def _inspect(fd: int, size_bytes: int) -> dict[str, Any]:
    """In the child: what `fd` holds, as JSON."""
    try:
        header = qcow2.parse(lambda offset, length: os.pread(fd, length, offset), size_bytes)
    except Malformed as error:
        return {_MALFORMED: str(error)}
    name = header.backing_name
    return {
        "backing_name": None if name is None else name.hex(),
        "backing_format": header.backing_format,
        "refusals": list(header.refusals),
        "virtual_bytes": header.virtual_bytes,
        "cluster_bytes": header.cluster_bytes,
    }


def _header_from(path: Path, answer: dict[str, Any]) -> Qcow2Header:
    """Take the child's word for the content, but for nothing about its shape."""
    if _MALFORMED in answer:
        hint = "if it is a raw image, say so: format=raw; else put back a copy that is whole"
        raise HeaderRefused(path, escaped(str(answer[_MALFORMED])), hint=hint)
    name, backing_format = answer["backing_name"], answer["backing_format"]
    virtual_bytes, cluster_bytes = int(answer["virtual_bytes"]), int(answer["cluster_bytes"])
    if virtual_bytes < 0 or cluster_bytes <= 0:
        raise ValueError("no size is negative")
    return Qcow2Header(
        backing_name=None if name is None else bytes.fromhex(name),
        backing_format=None if backing_format is None else escaped(str(backing_format)),
        refusals=tuple(escaped(str(refusal)) for refusal in answer["refusals"]),
        virtual_bytes=virtual_bytes,
        cluster_bytes=cluster_bytes,
    )

"""Files that people write, in TOML or JSON: read whole, bounded, into plain values."""

import json
import os
import stat
from pathlib import Path

from kvmsec.linux.files import read_bounded

LIMIT_BYTES = 1 << 20


def read_document(path: Path) -> dict[str, object]:
    """The table that a file holds; JSON when its name ends so, TOML else.

    Raises OSError (FileNotFoundError among them), and ValueError that says what is wrong with the
    content, a file over 1 MiB included. A FIFO or a device is refused rather than waited for.
    """
    text = _read_regular(path).decode()
    try:
        document = json.loads(text) if path.suffix == ".json" else _parse_toml(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it must hold a table of keys and values")
    return document


def _parse_toml(text: str) -> dict[str, object]:
    import tomllib  # a node without files to read does not pay for it

    return tomllib.loads(text)


def _read_regular(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return read_bounded(descriptor, LIMIT_BYTES)
    finally:
        os.close(descriptor)


def describe_failure(error: OSError | ValueError) -> str:
    """Why a file could not be read, without the path, which its reader names anyway."""
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    return f"can't be read: {error}"

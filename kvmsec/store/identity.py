"""Who a node is: `node.json`, beside its copy of the cluster's state."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import msgspec
from attrs import frozen

from kvmsec.errors import NotRoot, StoreTooNew, StoreUnreadable
from kvmsec.linux.files import read_bounded, remove_file, write_atomically

FORMAT: Final = 1
_LIMIT_BYTES: Final = 1 << 16


@frozen(kw_only=True)
class Identity:
    """A node's uuid, the cluster that it belongs to, and when its copy was last confirmed.

    `cluster_uuid` is None from the moment that a node has a uuid until it is a member;
    `confirmed_at` stays None on the master, which has no copy.
    """

    uuid: UUID
    cluster_uuid: UUID | None = None
    confirmed_at: datetime | None = None


class _Kept(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    format: int
    uuid: UUID
    cluster_uuid: UUID | None
    confirmed_at: Annotated[datetime, msgspec.Meta(tz=True)] | None


class IdentityFile:
    """The file `path`: root's alone, replaced by rename."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Identity | None:
        """The node's identity; None before it has one. Raises StoreUnreadable and StoreTooNew."""
        try:
            document = json.loads(self._read())
            found = document.get("format") if isinstance(document, dict) else None
            if isinstance(found, int) and found > FORMAT:
                raise StoreTooNew(self.path, found, FORMAT)
            kept = msgspec.convert(document, _Kept)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise NotRoot(f"reading {self.path}") from error
        except OSError as error:
            raise StoreUnreadable(self.path, error.strerror or str(error)) from error
        except (ValueError, RecursionError) as error:
            raise StoreUnreadable(self.path, str(error)) from error
        return Identity(
            uuid=kept.uuid, cluster_uuid=kept.cluster_uuid, confirmed_at=kept.confirmed_at
        )

    def _read(self) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return read_bounded(descriptor, _LIMIT_BYTES)
        finally:
            os.close(descriptor)

    def save(self, identity: Identity) -> None:
        """Raises OSError; what was there before stands then."""
        kept = _Kept(
            format=FORMAT,
            uuid=identity.uuid,
            cluster_uuid=identity.cluster_uuid,
            confirmed_at=identity.confirmed_at,
        )
        write_atomically(self.path, msgspec.json.format(msgspec.json.encode(kept)) + b"\n")

    def remove(self) -> None:
        remove_file(self.path)

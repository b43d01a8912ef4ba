"""Whether another instance has an image open, of this root or another: decided from own records.

QEMU's locks can't decide it, since whoever holds a locked descriptor can unlock it.
"""

from collections.abc import Iterable
from contextlib import ExitStack

from hypervisor.images import OpenImage, chain_of, open_chains
from hypervisor.images.errors import ImageError
from hypervisor.machine import Machine
from kvmsec.linux.credentials import Credentials
from kvmsec.node.image_holdings import Holding
from kvmsec.node.records import ImageUse, InstanceRecord


class ImageInUse(ImageError):
    """Another instance has the image open, and one of the two may write to it."""

    def __init__(self, image: OpenImage, holder: str, root: str | None = None) -> None:
        whose = f" of the root {root}" if root else ""
        how = f" (kvmsec --root {root} instance stop {holder})" if root else ""
        super().__init__(
            image.path,
            f"is in use by the instance {holder}{whose}",
            hint=f"stop {holder} first{how}, or give this instance an image of its own",
        )
        self.holder = holder
        self.root = root


def open_disks(
    machine: Machine, inspector: Credentials, opened: ExitStack
) -> tuple[tuple[OpenImage, ...], ...]:
    """Open every image of a machine, a chain a disk; `opened` closes them. Raises ImageError."""
    chains = open_chains([chain_of(disk) for disk in machine.disks], inspector=inspector)
    for chain in chains:
        for image in chain:
            opened.callback(image.close)
    return chains


def uses_of(images: Iterable[OpenImage]) -> tuple[ImageUse, ...]:
    """What a record says of the images that an instance has open."""
    return tuple(
        ImageUse(str(image.identity), str(image.path), not image.readonly) for image in images
    )


def require_unused(
    images: Iterable[OpenImage], others: Iterable[InstanceRecord], elsewhere: Iterable[Holding]
) -> None:
    """Raise ImageInUse when one of `images` is open elsewhere, unless both only read it.

    `others` are the other instances of this root, `elsewhere` is what those of other roots hold.
    """
    holders: dict[str, list[tuple[ImageUse, str, str | None]]] = {}
    for record in others:
        for use in record.images:
            holders.setdefault(use.identity, []).append((use, record.name, None))
    for holding in elsewhere:
        for use in holding.images:
            holders.setdefault(use.identity, []).append((use, holding.instance, holding.root))
    for image in images:
        for use, holder, root in holders.get(str(image.identity), ()):
            if use.is_written or not image.readonly:
                raise ImageInUse(image, holder, root)

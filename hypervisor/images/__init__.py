"""Disk images: opened without links, headers read by nobody, chains as the definition says."""

from hypervisor.images.backing import ImageFile, chain_of
from hypervisor.images.errors import (
    BackingMismatch,
    HeaderRefused,
    ImageError,
    ImageLocked,
    ImageNotOpened,
    ImageUsedTwice,
    InspectionFailed,
    NotAnImage,
)
from hypervisor.images.identity import ImageIdentity
from hypervisor.images.locks import lock
from hypervisor.images.opening import OpenImage, open_chains

__all__ = (
    "BackingMismatch",
    "HeaderRefused",
    "ImageError",
    "ImageFile",
    "ImageIdentity",
    "ImageLocked",
    "ImageNotOpened",
    "ImageUsedTwice",
    "InspectionFailed",
    "NotAnImage",
    "OpenImage",
    "chain_of",
    "lock",
    "open_chains",
)

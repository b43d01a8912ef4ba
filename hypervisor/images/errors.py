"""Why an image is not handed to QEMU; each error names the file and what was found."""

from pathlib import Path

from hypervisor.errors import HypervisorError
from hypervisor.foreign_text import escaped


class ImageError(HypervisorError):
    """The root of what `hypervisor.images` raises: `path` and the `finding`, fit to be shown."""

    def __init__(self, path: Path, finding: str, *, hint: str | None = None) -> None:
        super().__init__(f"disk {escaped(str(path), limit_chars=4096)} {finding}", hint=hint)
        self.path = path
        self.finding = finding


class ImageNotOpened(ImageError):
    """The kernel did not let root open the path; `errno` is its reason (ELOOP: a link was met)."""

    def __init__(self, path: Path, errno: int, finding: str, *, hint: str | None = None) -> None:
        super().__init__(path, finding, hint=hint)
        self.errno = errno


class NotAnImage(ImageError):
    """The path is there, but is neither a regular file nor a block device."""


class HeaderRefused(ImageError):
    """What the image says of itself is malformed, or asks for what no instance may have."""


class BackingMismatch(ImageError):
    """The backing file in the image's header is not the one that the definition gives."""


class ImageUsedTwice(ImageError):
    """Two of a machine's disks come down to the same file, and one of them may write it."""

    def __init__(self, path: Path, other: Path) -> None:
        shown = escaped(str(other), limit_chars=4096)
        also = "named twice" if other == path else f"the same file as {shown}"
        super().__init__(
            path,
            f"is {also} in this machine",
            hint="give each disk a file of its own; only read-only base images can be shared",
        )
        self.other = other


class ImageLocked(ImageError):
    """Another program uses the image in a way that excludes ours, or holds a lock on it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            "is locked: another program uses it",
            hint="end it first (`lslocks` shows who locks files, `fuser FILE` who has it open)",
        )


class InspectionFailed(ImageError):
    """The child that reads headers ended without a result, or not in time."""

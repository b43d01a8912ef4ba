"""What is mounted where, as this kernel writes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsec.linux import namespaces
from kvmsec.linux.mounts import read_mount_points, read_mounts

pytestmark = pytest.mark.root

# Of what may end a line to somebody the kernel escapes newlines alone.
NAMES = ["a\rb", "a\r\nb", "a\x0b\x0c\x1c\x1d\x1e\x85\u2028b", "\r", "a - b\\134 c\t\udcff"]


@pytest.fixture(params=NAMES, ids=ascii)
def point(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A directory with a filesystem mounted on it."""
    place = tmp_path / request.param
    place.mkdir()
    namespaces.mount("x", str(place), "tmpfs", 0)
    yield str(place)
    namespaces.umount(str(place), namespaces.MNT_DETACH)


def test_a_mount_points_name_ends_no_line(point: str, tmp_path: Path) -> None:
    (mount,) = (mount for mount in read_mounts() if mount.path.startswith(f"{tmp_path}/"))
    assert (mount.path, mount.kind) == (point, "tmpfs")
    assert read_mount_points([str(tmp_path)]) == {point}

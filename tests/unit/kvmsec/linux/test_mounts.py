"""What is mounted below some directories, told from the text of a mountinfo."""

import pytest

from kvmsec.linux.mounts import mount_points, read_mount_points, read_mounts

INFO = b"""\
20 1 8:1 / / rw - ext4 /dev/root rw
21 20 0:20 / /tmp rw - tmpfs tmpfs rw
22 21 0:21 / /tmp/deep/er rw - tmpfs tmpfs rw
23 21 8:1 /tmp/bound /mnt rw - ext4 /dev/root rw
24 21 8:1 /tmp/other /tmp/here rw - ext4 /tmp/device rw
25 20 0:22 / /var/tmpfs rw - tmpfs /tmp/name rw
26 20 0:23 / /srv/a\\040b/c\\040d rw - tmpfs tmpfs rw
27 21 0:24 / /tmp/last rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("below", "found"),
    [
        (["/tmp"], {"/tmp/deep/er", "/tmp/here", "/tmp/last"}),
        (["/tmp/deep", "/var"], {"/tmp/deep/er", "/var/tmpfs"}),
        (["/var/tmp"], set()),
        (["/srv/a b"], {"/srv/a b/c d"}),
        ([], set()),
    ],
)
def test_what_is_mounted_below(below: list[str], found: set[str]) -> None:
    assert mount_points(INFO, below) == found


def test_this_host_is_read_as_it_is_line_by_line() -> None:
    every = {mount.path for mount in read_mounts()}
    below = ["/dev", "/sys", "/proc"]

    assert read_mount_points(below) == {
        path for path in every if path.startswith(("/dev/", "/sys/", "/proc/"))
    }

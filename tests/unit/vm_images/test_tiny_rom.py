"""The ROM that ships is what its source says."""

import shutil
import subprocess
from pathlib import Path

import pytest

from hypervisor import tiny

BUILD = Path(__file__).parents[3] / "vm-images" / "tiny" / "build"
ROM_BYTES = 64 * 1024
DISK_BYTES = 1024 * 1024
BUILD_DEADLINE_S = 60


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both images, built anew."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is missing: apt-get install nasm")
    output = tmp_path_factory.mktemp("tiny")
    subprocess.run([BUILD, output], check=True, timeout=BUILD_DEADLINE_S)
    return output


def test_the_shipped_rom_is_what_the_source_builds(built: Path) -> None:
    assert (built / "tiny.rom").read_bytes() == tiny.rom_path().read_bytes(), (
        "run vm-images/tiny/build and copy its tiny.rom to hypervisor/data"
    )


def test_a_second_build_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    subprocess.run([BUILD, tmp_path], check=True, timeout=BUILD_DEADLINE_S)
    for name in ("tiny.rom", "tiny.img"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_a_build_leaves_nothing_but_the_images(built: Path) -> None:
    assert sorted(path.name for path in built.iterdir()) == ["tiny.img", "tiny.rom"]


def test_the_rom_begins_at_the_reset_vector() -> None:
    rom = tiny.rom_path().read_bytes()
    assert len(rom) == ROM_BYTES
    far_jump = rom[-16:-11]
    assert far_jump[0] == 0xEA
    assert far_jump[3:] == b"\x00\xf0"
    assert tiny.BANNER in rom


def test_the_disk_can_be_booted_and_carries_its_mark(built: Path) -> None:
    image = (built / "tiny.img").read_bytes()
    assert len(image) == DISK_BYTES
    assert image[510:512] == b"\x55\xaa"
    assert image[512:528] == b"KVMSEC-DISK-0001"
    assert not any(image[528 : 10 * 512]), "sectors 2 to 9 are for the guest's writes"


def test_a_missing_output_directory_is_a_usage_error() -> None:
    done = subprocess.run([BUILD], capture_output=True, timeout=BUILD_DEADLINE_S, check=False)
    assert done.returncode == 2
    assert b"usage" in done.stderr

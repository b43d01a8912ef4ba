"""What is installed from a wheel: all that the checkout has of the packages, and nothing else."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("firewall", "hypervisor", "kvmsec", "uidpool")
BUILD = "import hatchling.build, sys; hatchling.build.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel's contents, as pip would lay them out."""
    place = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-c", BUILD, place]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def files_of(place: Path) -> set[str]:
    found = (path for package in PACKAGES for path in (place / package).rglob("*"))
    return {
        str(path.relative_to(place))
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_four_packages_and_nothing_else(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert tops == set(PACKAGES)
    assert files_of(unpacked) == files_of(ROOT)
    assert "hypervisor/data/tiny.rom" in files_of(unpacked)


def run_from(unpacked: Path, program: str, *arguments: str) -> str:
    """Have a Python run it that finds our packages in the wheel, not in the checkout."""
    path = f"import sys; sys.path.insert(0, {str(unpacked)!r}); sys.argv[0] = 'kvmsec'; "
    argv = [sys.executable, "-I", "-c", path + program, *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_command_is_what_the_wheel_says(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    module, _, function = scripts["console_scripts"]["kvmsec"].partition(":")
    program = f"from {module} import {function} as run; run()"
    assert "uids" in run_from(unpacked, program, "--help")


def test_the_tiny_guest_is_found_where_the_wheel_is_installed(unpacked: Path) -> None:
    program = "from hypervisor import tiny; print(tiny.rom_path())"
    found = Path(run_from(unpacked, program).strip())
    assert found.is_relative_to(unpacked)
    assert found.read_bytes() == (ROOT / "hypervisor" / "data" / "tiny.rom").read_bytes()

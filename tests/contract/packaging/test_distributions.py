"""The wheel and the sdist: what is in them, that pip installs them, and one version everywhere."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = {"firewall", "hypervisor", "kvmsec", "uidpool"}
DEADLINE_S = 120


def build(what: str, source: Path, place: Path) -> Path:
    program = f"import hatchling.build, sys; hatchling.build.build_{what}(sys.argv[1])"
    argv = [sys.executable, "-c", program, place]
    subprocess.run(argv, cwd=source, check=True, capture_output=True, timeout=DEADLINE_S)
    (built,) = place.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the sdist."""
    place = tmp_path_factory.mktemp("sdist")
    sdist = build("sdist", ROOT, place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked")
    (top,) = (place / "unpacked").iterdir()
    return top


def version() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_sdist_is_enough_to_build_the_same_wheel(
    unpacked: Path, wheel: Path, tmp_path: Path
) -> None:
    again = build("wheel", unpacked, tmp_path)
    assert again.name == wheel.name
    assert names_in(again) == names_in(wheel)
    assert {name.partition("/")[0] for name in names_in(wheel)} == PACKAGES


def test_the_sdist_has_what_one_works_on_it_with_and_nothing_that_was_built(unpacked: Path) -> None:
    have = {path.name for path in unpacked.iterdir()}
    assert {"tests", "docs", "packaging", "vm-images", "dev", "CHANGELOG.md"} <= have
    assert not {".venv", "dist", "build", ".git"} & have
    assert not list(unpacked.rglob("__pycache__"))
    assert not list(unpacked.rglob(".build"))


def test_pip_installs_the_wheel_and_the_command_says_its_version(
    wheel: Path, tmp_path: Path
) -> None:
    """The dependencies are those of this environment: the sandbox has no network."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, site, wheel], check=True, capture_output=True, timeout=DEADLINE_S)
    start = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'kvmsec'; "
    run = start + "from kvmsec.cli.main import entry_point as run; import kvmsec as at; "
    show = run + "print(at.__file__, flush=True); run()"
    argv = [sys.executable, "-I", "-c", show, "--version"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    where, said = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert said == f"kvmsec {version()}"
    assert (site / "bin" / "kvmsec").exists()


def test_the_version_is_written_in_one_place() -> None:
    """Whoever else needs it reads it there: no file of the project repeats it."""
    stated = re.compile(rf"(?<![\d.]){re.escape(version())}(?![\d.])")
    code = [*ROOT.glob("kvmsec/**/*.py"), *ROOT.glob("packaging/**/*"), ROOT / "dev"]
    files = [path for path in code if path.is_file() and "__pycache__" not in path.parts]
    assert [str(path) for path in files if stated.search(path.read_text())] == []


def test_the_changelog_keeps_to_its_form() -> None:
    """https://keepachangelog.com/en/1.1.0/: the newest first, kinds of change by their names."""
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    dated = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}")
    assert [one for one in releases[1:] if not dated.fullmatch(one)] == []
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

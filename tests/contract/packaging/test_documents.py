"""The man pages and completions: every command and option is there, and the shells take them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvmsec.cli.main import kvmsec

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes /usr/share."""
    place = tmp_path_factory.mktemp("share")
    argv = [sys.executable, ROOT / "packaging" / "documents.py", place]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE_S)
    return place


def nouns() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(kvmsec, info_name="kvmsec")
    for name in kvmsec.list_commands(context):
        command = kvmsec.get_command(context, name)
        assert command is not None
        yield name, command


def leaves(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from leaves(f"{path} {name}", below)


def page(share: Path, name: str) -> str:
    return (share / "man" / "man1" / f"{name}.1").read_text().replace("\\-", "-")


def test_there_is_a_page_for_the_command_and_for_each_noun(share: Path) -> None:
    names = {path.name for path in (share / "man" / "man1").iterdir()}
    assert names == {"kvmsec.1", *(f"kvmsec-{name}.1" for name, _ in nouns())}
    for name, _ in nouns():
        assert f"kvmsec-{name}" in page(share, "kvmsec")


@pytest.mark.parametrize("name", [name for name, _ in nouns()])
def test_a_page_has_every_verb_and_option_with_its_help(share: Path, name: str) -> None:
    text = page(share, f"kvmsec-{name}")
    for path, command in leaves(f"kvmsec {name}", dict(nouns())[name]):
        assert path in text
        assert str(command.help).split("\n", 1)[0].strip() in text
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(flag in text for flag in option.opts)
                assert " ".join(str(option.help).split()) in text


def test_roff_finds_nothing_to_complain_of(share: Path) -> None:
    groff = shutil.which("groff")
    for path in sorted((share / "man" / "man1").iterdir()):
        lines = path.read_text().splitlines()
        assert lines[0].startswith(".TH KVMSEC")
        requests = {line.split(" ")[0] for line in lines if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".SS", ".PP", ".TP"}
        if groff:
            argv = [groff, "-man", "-Kutf8", "-Tutf8", "-ww", "-z", path]
            done = subprocess.run(argv, capture_output=True, check=True, timeout=DEADLINE_S)
            assert done.stderr == b""


def test_bash_completes_a_noun_and_its_verb(share: Path, tmp_path: Path) -> None:
    command = tmp_path / "kvmsec"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'kvmsec'\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from kvmsec.cli.main import entry_point\nentry_point()\n"
    )
    command.chmod(0o755)
    script = share / "bash-completion" / "completions" / "kvmsec"

    def completed(*words: str) -> list[str]:
        line = " ".join(words)
        asked = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        asked += f"_kvmsec_completion {command}; echo ${{COMPREPLY[@]}}"
        argv = ["bash", "--norc", "-c", asked]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
        return done.stdout.split()

    assert completed("kvmsec", "inst") == ["instance"]
    assert completed("kvmsec", "instance", "auto") == ["autostart"]


@pytest.mark.parametrize(
    "place", ["zsh/vendor-completions/_kvmsec", "fish/vendor_completions.d/kvmsec.fish"]
)
def test_the_other_shells_have_theirs(share: Path, place: str) -> None:
    text = (share / place).read_text()
    assert "_KVMSEC_COMPLETE=" in text
    assert "%(" not in text

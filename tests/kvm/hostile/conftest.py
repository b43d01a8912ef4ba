"""A node that is ill-treated, and programs in QEMU's place."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import frozen

from tests.kvm.hostile import programs

_E = TypeVar("_E", bound=BaseException)

COMMAND = Path(sys.executable).with_name("kvmsec")
WITHOUT_REST = "[uids]\nreuse_delay_s = 0\n"


@frozen
class Done:
    """How a `kvmsec` command ended."""

    status: int
    out: str
    err: str

    def refused(self, *words: str, status: int = 1) -> str:
        """Hold it to the form of a refusal: what is wrong, what to do, and no more."""
        said = self.err.splitlines()
        assert self.status == status, self
        assert self.out == "", self
        assert said[0].startswith("kvmsec: "), self
        assert [line for line in said if line.startswith("hint: ")] == said[-1:], self
        assert "Traceback" not in self.err, self
        assert len(self.err) < 2000, "an error is for a person to read"
        for word in words:
            assert word in self.err, (word, self.err)
        return self.err


@frozen
class Place:
    """A node, and how it is held to leaving nothing of what it refuses."""

    lab: Any

    def traces(self) -> dict[str, Any]:
        found = self.lab.leftovers()
        found["processes"] = [line.split()[0] for line in found.get("processes", [])]
        return {**found, "rules": self.lab.rules()}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is done inside must leave nothing."""
        before = self.traces()
        yield
        assert self.traces() == before

    def refused(self, kind: type[_E], name: str = "web", **machine: Any) -> _E:
        """A start that must fail with this error and leave nothing; returns the error."""
        with self.unchanged(), pytest.raises(kind) as caught:
            self.lab.start(name, **machine)
        return caught.value

    def command(self, *arguments: str) -> list[str]:
        return [str(COMMAND), "--root", str(self.lab.root), *arguments]

    def kvmsec(self, *arguments: str | Path, user: int | None = None) -> Done:
        """Run the command itself, as another user where one is named."""
        argv = self.command(*map(str, arguments))
        if user is not None:
            ids = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            argv = ["setpriv", *ids, *argv]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def make_place(make_lab: Callable[..., Any]) -> Callable[[str], Place]:
    """Makes a node with this kvmsec.toml."""
    return lambda config: Place(make_lab(config))


@pytest.fixture
def place(make_place: Callable[[str], Place]) -> Place:
    """A node whose released uids do not rest: what a refused start drew is as free as before."""
    return make_place(WITHOUT_REST)


@pytest.fixture(scope="session")
def stand_ins() -> Iterator[Path]:
    """A directory of programs in QEMU's place: see programs.py."""
    with programs.stand_ins() as folder:
        yield folder

"""Runs a command again and again, each killed at a step at which none before it was.

`python -m tests.root.daemon.killed_command ROOT WORD... -- WORD...`: the first words begin a
renewal, those after `--` go on with one that has a journal. It prints, as JSON, the steps at which
it was killed, the status of the one that came to its end and what that said. Everything is imported
once, and each run is a fork.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import kvmsec.daemon.courier
import kvmsec.daemon.renewing
import kvmsec.rpc.remote
from kvmsec.cli.main import entry_point
from kvmsec.cli.session import Session
from kvmsec.paths import Paths

_END = "the end"
_MOST = 100


def run() -> None:
    root, *words = sys.argv[1:]
    begin, go_on = words[: words.index("--")], words[words.index("--") + 1 :]
    assert kvmsec.daemon.courier and kvmsec.daemon.renewing and kvmsec.rpc.remote
    with tempfile.TemporaryDirectory() as place:
        seen, said = Path(place) / "seen", Path(place) / "said"
        seen.touch()
        status = 0
        for _ in range(_MOST):
            words = go_on if Paths(Path(root)).renewal.exists() else begin
            status = _status_of(["--root", root, *words], seen, said)
            # The master's daemon may end a renewal between two runs: then another is begun.
            if status != -signal.SIGKILL and (status or _END in seen.read_text().splitlines()):
                break
        steps = seen.read_text().splitlines()
        print(json.dumps({"steps": steps, "status": status, "said": said.read_text()}))


def _status_of(words: list[str], seen: Path, said: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            _be_the_command(words, seen, said)
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _be_the_command(words: list[str], seen: Path, said: Path) -> None:
    def die(_: Session, step: str) -> None:
        if step not in seen.read_text().splitlines():
            with seen.open("a") as file:
                file.write(f"{step}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    Session.on_step = die  # type: ignore[method-assign]
    heard = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(heard, descriptor)
    sys.argv = ["kvmsec", *words]
    try:
        entry_point()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)


if __name__ == "__main__":
    run()

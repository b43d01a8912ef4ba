"""The tests that run in whole hosts: they are there, and no more than there is time for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SELECTION = "tests/nested/selection.txt"
MOST = 40


def test_every_selected_test_is_there_and_they_are_not_too_many() -> None:
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"@{SELECTION}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    # Where control groups of version 1 are mounted, a test runs for each of their hierarchies.
    assert len({line.partition("[/sys/fs/cgroup")[0] for line in found}) <= MOST

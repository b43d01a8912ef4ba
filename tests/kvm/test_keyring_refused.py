"""The command on a host that refuses keyctl(2), as a container's filter does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny

pytestmark = pytest.mark.kvm

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "from tests.refused_calls import KEYCTL, answer; answer(1, KEYCTL); "
    "from kvmsec.cli.main import entry_point; entry_point()"
)
TOLERANT = '[confinement]\nmay_be_missing = ["session-keyring"]\n'


def command(lab: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", PROGRAM, "--root", str(lab.root), *arguments]
    return subprocess.run(
        argv, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60
    )


def start(lab: Any) -> subprocess.CompletedProcess[str]:
    guest = ("--firmware", str(tiny.rom_path()), "--memory", "1", "--accel", lab.accelerator)
    return command(lab, "instance", "start", "web", *guest)


def finding(lab: Any) -> dict[str, str]:
    found = json.loads(command(lab, "doctor", "--json").stdout)
    (one,) = [one for one in found if one["code"] == "session-keyring"]
    return dict(one)


def test_a_start_is_refused_there_and_doctor_says_why(lab: Any) -> None:
    refused = start(lab)

    assert refused.returncode == 1
    assert "the jail's step 'session keyring' failed" in refused.stderr
    assert 'may_be_missing = ["session-keyring"]' in refused.stderr
    assert not lab.leftovers()
    assert finding(lab)["severity"] == "error"


def test_it_starts_where_the_node_says_that_it_may_be_missing(
    make_lab: Callable[..., Any],
) -> None:
    lab = make_lab(TOLERANT)

    started = start(lab)

    assert started.returncode == 0, started.stderr
    assert finding(lab)["severity"] == "warning"
    lab.stop()

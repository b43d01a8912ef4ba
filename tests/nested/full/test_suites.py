"""The tests of the other suites pass in a host of this release, on its kernel, under real KVM."""

import xml.etree.ElementTree as ElementTree

import pytest

from tests.nested.full.conftest import REPORTS
from tests.nested.host import Answer, Host
from tests.nested.machine import is_emulated
from tests.nested.stages import Stages

MOST_WHERE_EMULATED = 40
SUITES = ("tests/kvm", "tests/root", "tests/contract", "tests/attacks")
SUITES_DEADLINE_S = 1500.0
_TAIL_CHARS = 8000
_PYTHON = "/opt/kvmsec-tests/bin/python"


def test_what_was_selected_passes_and_none_of_it_is_skipped(
    bare_host: Host, request: pytest.FixtureRequest, stages: Stages
) -> None:
    """Where processors are emulated a selection, else the suites as they are."""
    suites = ("@tests/nested/selection.txt",) if is_emulated() else SUITES
    chosen = request.config.getoption("inside") or suites
    done, suite = _run(bare_host, *chosen)
    if failed := _failed(suite):
        # Told now, also where a second try passes or never ends.
        request.config.get_terminal_writer().line(f"\n{done.text[-_TAIL_CHARS:]}")
    if failed and is_emulated():
        # Such a processor is shared with another host's, and stops for seconds at a time.
        with stages.measured(f"debian{bare_host.release}: a second try of {', '.join(failed)}"):
            done, suite = _run(bare_host, "--last-failed", *chosen)
    assert done.status == 0, done.text[-_TAIL_CHARS:]
    assert "ran under TCG" not in done.text, "guests of a host in a box have KVM"
    assert int(suite.attrib["tests"]) > 0
    if is_emulated():
        assert int(suite.attrib["tests"]) <= MOST_WHERE_EMULATED
        assert int(suite.attrib["skipped"]) == 0, done.text[-_TAIL_CHARS:]


def _run(host: Host, *chosen: str) -> tuple[Answer, ElementTree.Element]:
    done = host.shell(
        "cd /srv/kvmsec; tests/attacks/build .venv/attacks >/dev/null; "
        f"{_PYTHON} -m pytest --require -q --durations=10 "
        f"--junitxml=/srv/kvmsec/reports/suites.xml {' '.join(chosen)}",
        status=None,
        timeout_s=SUITES_DEADLINE_S,
        environment={"KVMSEC_KVM_BOOT_DEADLINE_S": "120"},
    )
    reports = REPORTS / f"debian{host.release}"
    host.fetch("/srv/kvmsec/reports", reports)
    return done, ElementTree.parse(reports / "suites.xml").getroot()[0]


def _failed(suite: ElementTree.Element) -> list[str]:
    return [
        case.attrib["name"]
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]

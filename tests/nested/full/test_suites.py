"""The tests of the other suites pass in a host of this release, on its kernel, under real KVM."""

import xml.etree.ElementTree as ElementTree

import pytest

from tests.nested.full.conftest import REPORTS
from tests.nested.host import Host
from tests.nested.machine import is_emulated

MOST_WHERE_EMULATED = 40
SUITES = ("tests/kvm", "tests/root", "tests/contract", "tests/attacks")
SUITES_DEADLINE_S = 1500.0
_PYTHON = "/opt/kvmsec-tests/bin/python"


def test_what_was_selected_passes_and_none_of_it_is_skipped(
    bare_host: Host, request: pytest.FixtureRequest
) -> None:
    """Where processors are emulated a selection, else the suites as they are."""
    suites = ("@tests/nested/selection.txt",) if is_emulated() else SUITES
    chosen = request.config.getoption("inside") or suites
    name = f"debian{bare_host.release}"
    done = bare_host.shell(
        "cd /srv/kvmsec; tests/attacks/build .venv/attacks >/dev/null; "
        f"{_PYTHON} -m pytest --require -q --durations=10 "
        f"--junitxml=/srv/kvmsec/reports/suites.xml {' '.join(chosen)}",
        status=None,
        timeout_s=SUITES_DEADLINE_S,
        environment={"KVMSEC_KVM_BOOT_DEADLINE_S": "120"},
    )
    bare_host.fetch("/srv/kvmsec/reports", REPORTS / name)
    assert done.status == 0, done.text[-8000:]
    assert "ran under TCG" not in done.text, "guests of a host in a box have KVM"
    suite = ElementTree.parse(REPORTS / name / "suites.xml").getroot()[0]
    assert int(suite.attrib["tests"]) > 0
    if is_emulated():
        assert int(suite.attrib["tests"]) <= MOST_WHERE_EMULATED
        assert int(suite.attrib["skipped"]) == 0, done.text[-4000:]

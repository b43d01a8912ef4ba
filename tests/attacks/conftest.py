"""One launch for all attacks of a run, and the table of what refused what at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks.assault import Run, carry_out
from tests.attacks.attacker import Answer, program
from tests.attacks.report import lines
from tests.kvm.accelerator import accelerator
from tests.kvm.lab import users

_RESULTS = pytest.StashKey[dict[Run, dict[str, Answer]]]()


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was found out about the programs in use: asked once for all runs."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def carried_out(
    request: pytest.FixtureRequest, features: Path
) -> Callable[[Run], dict[str, Answer]]:
    """Gives the answers of a run, which is carried out when it is first asked for."""
    results = request.config.stash.setdefault(_RESULTS, {})

    failed: dict[Run, Exception] = {}

    def once(run: Run) -> dict[str, Answer]:
        if run in failed:
            pytest.fail(f"the run failed as a whole: {failed[run]!r}", pytrace=False)
        if run not in results:
            try:
                with users():
                    results[run] = carry_out(run, program(), accelerator(), features)
            except Exception as error:
                failed[run] = error
                raise
        return results[run]

    return once


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash.get(_RESULTS, {})
    if results:
        terminalreporter.section("attacks: what refused them")
        for line in lines(results):
            terminalreporter.line(line)

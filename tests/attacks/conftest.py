"""One launch for all attacks of a run, and the table of what refused what at the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attacks.assault import CONTROL, Means, Run, carry_out
from tests.attacks.attacker import Answer, program
from tests.attacks.report import lines
from tests.kvm.accelerator import accelerator
from tests.kvm.hostile.programs import stand_ins
from tests.kvm.lab import users

_HERE = Path(__file__).parent
_RESULTS = pytest.StashKey[dict[Run, dict[str, Answer]]]()


@pytest.fixture(scope="session")
def means(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Means]:
    """Programs are asked what they can do once for all runs."""
    with stand_ins() as folder:
        yield Means(program(), folder, accelerator(), tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def carried_out(request: pytest.FixtureRequest, means: Means) -> Callable[[Run], dict[str, Answer]]:
    """Gives the answers of a run, which is carried out when it is first asked for."""
    results = request.config.stash.setdefault(_RESULTS, {})

    failed: dict[Run, Exception] = {}

    def once(run: Run) -> dict[str, Answer]:
        if run in failed:
            pytest.fail(f"the run failed as a whole: {failed[run]!r}", pytrace=False)
        if run not in results:
            try:
                with users():
                    results[run] = carry_out(run, means, _asked_for(request.session, run))
            except Exception as error:
                failed[run] = error
                raise
        return results[run]

    return once


def _asked_for(session: pytest.Session, run: Run) -> set[str]:
    """The attacks of a run that some selected test is about."""
    # Another suite has an `attack` too, which is none of these.
    ours = [item for item in session.items if item.path.parent == _HERE]
    told = [getattr(item, "callspec", None) for item in ours]
    params = [one.params for one in told if one is not None and "attack" in one.params]
    return {one["attack"].name for one in params if one.get("run", CONTROL) == run}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash.get(_RESULTS, {})
    if results:
        terminalreporter.section("attacks: what refused them")
        for line in lines(results):
            terminalreporter.line(line)

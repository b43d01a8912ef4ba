"""Hosts in boxes: nested KVM on Debian's kernels, with systemd and control groups of version 2."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.nested.stages import Stages

_STAGES = pytest.StashKey[Stages]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="both Debian hosts, not the smoke test alone"
    )
    parser.addoption(
        "--inside",
        action="append",
        metavar="TEST",
        help="run this test in the hosts, in place of those that are selected; may be repeated",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The whole hosts are for those who ask: they take long where they are emulated."""
    is_whole = collection_path.name == "full" and collection_path.parent.name == "nested"
    return True if is_whole and not config.getoption("full", False) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say at once why a test failed: a run that is cut short comes to no summary."""
    report = yield
    if report.failed:
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(report.longreprtext)
    return report


@pytest.fixture(scope="session")
def stages(request: pytest.FixtureRequest) -> Stages:
    return request.config.stash.setdefault(_STAGES, Stages())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    stages = config.stash.get(_STAGES, None)
    if stages is not None and stages.done:
        terminalreporter.section("time of each stage")
        for name, seconds in stages.done:
            terminalreporter.line(f"{seconds:8.1f} s  {name}")

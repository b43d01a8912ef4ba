"""No command that would start a program is ever sent."""

from typing import Any

import pytest

from hypervisor.monitor.forbidden import reason_against


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("migrate", {"uri": "exec:cat >/dev/null"}),
        ("migrate", {"uri": " EXEC:x"}),
        ("migrate-incoming", {"uri": "exec:cat"}),
        ("migrate", {"channels": [{"addr": {"transport": "exec", "args": ["x"]}}]}),
        ("migrate", {"channels": ({"addr": {"transport": "fd"}}, {"addr": {"transport": "exec"}})}),
        ("human-monitor-command", {"command-line": "migrate -d exec:cat"}),
        ("human-monitor-command", {"command-line": 'migrate_incoming "exec:cat"'}),
    ],
)
def test_a_migration_through_a_program_is_refused(command: str, arguments: dict[str, Any]) -> None:
    assert reason_against(command, arguments) is not None


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("migrate", {"uri": "fd:m"}),
        ("migrate", {"uri": "unix:/run/exec:1"}),
        ("migrate", {"channels": [{"addr": {"transport": "fd", "str": "m"}}]}),
        ("migrate", {"channels": "nonsense"}),
        ("migrate", {"channels": [7, {"addr": 7}]}),
        ("migrate", {}),
        ("human-monitor-command", {"command-line": "info status"}),
        ("query-status", {}),
    ],
)
def test_everything_else_is_qemus_to_judge(command: str, arguments: dict[str, Any]) -> None:
    assert reason_against(command, arguments) is None

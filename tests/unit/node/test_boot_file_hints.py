"""A file that a machine can't boot from is refused with what to do about it."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from hypervisor.machine import Machine
from kvmsec.node.boot_files import BootFileRefused, open_all


@pytest.mark.parametrize("role", ["firmware", "kernel"])
def test_a_missing_file_is_refused_with_where_it_was_named(role: str, tmp_path: Path) -> None:
    machine = Machine(**{"name": "web", role: tmp_path / "none"})
    with ExitStack() as opened, pytest.raises(BootFileRefused, match="No such file") as caught:
        open_all(machine, opened)
    assert f"--{role}" in (caught.value.hint or "")


def test_an_empty_file_and_a_link_are_refused_with_a_hint_each(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("empty")
    hints = set()
    for name in ("empty", "link"):
        with ExitStack() as opened, pytest.raises(BootFileRefused) as caught:
            open_all(Machine(name="web", kernel=tmp_path / name), opened)
        hints.add(caught.value.hint)
    assert len(hints) == 2 and None not in hints

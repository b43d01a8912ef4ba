"""What is printed: escaped, aligned, and JSON where a machine reads."""

import io
import json
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from pathlib import Path

import pytest

from kvmsec.agent import Finding
from kvmsec.cli import output

HOSTILE = "a\x1b[31m\nkvmsec: b\u202e"


def test_a_table_off_a_terminal_is_plain_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name", "pid"), [("web", 12), ("a-longer-one", None)])

    assert capsys.readouterr().out == "NAME          PID\nweb           12\na-longer-one  -\n"


def test_a_table_escapes_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name",), [(HOSTILE,)])

    assert capsys.readouterr().out == "NAME\na\\x1b[31m\\nkvmsec: b\\u202e\n"


def test_a_table_on_a_terminal_takes_no_markup_from_its_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")

    output.print_table(("name", "state"), [("[red]web[/red]", "\x1b[2J")])

    assert "[red]web[/red]" in screen.getvalue()
    assert "\\x1b[2J" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()


def test_a_list_of_instances_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    row = ("web", "running", 47114, 241002, "kvmsec-241002", "pool", "kvm", "512 MiB", "1d 2h")

    output.print_table(
        ("name", "state", "pid", "uid", "user", "model", "accelerator", "memory", "uptime"), [row]
    )

    _, shown = screen.getvalue().splitlines()
    assert shown.split() == " ".join(map(str, row)).split()


def test_json_is_one_document_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    class Colour(Enum):
        RED = "red"

    at = datetime(2030, 1, 2, 5, 0, tzinfo=timezone(timedelta(hours=2)))
    output.print_json({"at": at, "path": Path("/x"), "colour": Colour.RED, "said": b"\xff"})

    assert json.loads(capsys.readouterr().out) == {
        "at": "2030-01-02T03:00:00+00:00",
        "path": "/x",
        "colour": "red",
        "said": "\\xff",
    }


def test_json_keeps_foreign_text_whole_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json([HOSTILE])

    printed = capsys.readouterr().out
    assert json.loads(printed) == [HOSTILE]
    assert printed.isascii()
    assert "\x1b" not in printed


def test_facts_tell_what_is_known_and_go_deeper(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts(
        {
            "name": "web",
            "pid": None,
            "autostart": False,
            "taps": ["t0", "t1"],
            "nothing": [],
            "machine": {"memory_mib": 1, "disks": [{"path": "/d"}]},
        }
    )

    assert capsys.readouterr().out == (
        "name:                  web\n"
        "autostart:             no\n"
        "taps:                  t0, t1\n"
        "machine.memory mib:    1\n"
        "machine.disks[0].path: /d\n"
    )


def test_a_long_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"rules": ["a" * 60, "  b\n" + "b" * 60], "tag": "kvmsec"})

    assert capsys.readouterr().out == (f"rules:\n  {'a' * 60}\n    b\\n{'b' * 60}\ntag:   kvmsec\n")


def test_findings_show_their_fix_below(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_findings(
        [
            Finding("kvm", "ok", "accelerator", "kvm works"),
            Finding("tun", "error", "tun", f"no {HOSTILE}", hint="load it"),
        ]
    )

    assert capsys.readouterr().out == (
        "ok       accelerator  kvm works\n"
        "error    tun          no a\\x1b[31m\n"
        "  kvmsec: b\\u202e\n"
        "                      hint: load it\n"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((-1, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m 00s"), (125, "2m 05s")),
        *((3600, "1h 00m"), (86399, "23h 59m"), (86400, "1d 0h"), (1e6, "11d 13h")),
    ],
)
def test_a_duration_has_two_units(seconds: float, shown: str) -> None:
    assert output.duration(seconds) == shown


def test_now_is_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json(datetime(2030, 1, 1, tzinfo=UTC))

    assert json.loads(capsys.readouterr().out) == "2030-01-01T00:00:00+00:00"

import msgspec
import pytest

from benchmarks.report import (
    Cell,
    Curve,
    Plot,
    Report,
    Table,
    Target,
    aligned,
    markdown,
    shown,
    targets_table,
)
from benchmarks.series import Summary

TABLE = Table(
    "walks",
    "Walks",
    ("way", "ms", "x"),
    (("short", Summary(1.234, 1, 2, 9), 1.0), ("long", None, 12.34)),
    "In summer.",
)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "missing"),
        ("by hand", "by hand"),
        (100_000, "100,000"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.012345, "0.0123"),
        (0.0, "0.00"),
        (Summary(20.0, 10.0, 30.0, 5), "20.0 (10.0 to 30.0)"),
        (Summary(20.0, 20.0, 20.0, 1), "20.0"),
    ],
)
def test_a_cell_has_three_digits_that_count(cell: Cell, words: str) -> None:
    assert shown(cell) == words


def test_a_table_in_markdown() -> None:
    assert markdown(TABLE).splitlines() == [
        "**Walks**",
        "",
        "| way | ms | x |",
        "| --- | --: | --: |",
        "| short | 1.23 (1.00 to 2.00) | 1.00 |",
        "| long | missing | 12.3 |",
        "",
        "In summer.",
    ]


def test_a_bar_in_a_cell_is_no_new_column() -> None:
    table = Table("t", "T", ("a",), (("x|y",),))

    assert "x\\|y" in markdown(table)


def test_a_table_for_a_terminal_has_straight_columns() -> None:
    lines = aligned(TABLE).splitlines()

    assert lines[0] == "Walks"
    assert lines[2].index("1.00 to") < lines[2].index("1.00", lines[2].index("to"))
    assert len({len(line) for line in lines[1:4]}) == 1


@pytest.mark.parametrize(
    ("measured", "at_least", "met"),
    [(1.0, False, True), (1.3, False, False), (1.3, True, True), (1.0, True, False)],
)
def test_a_target_is_met_on_its_side_of_the_bound(
    measured: float, at_least: bool, met: bool
) -> None:
    assert Target("it", 1.2, measured, at_least=at_least).is_met is met


def test_a_target_that_was_not_measured_is_neither_met_nor_missed() -> None:
    target = Target("it", 1.2, None, " x")

    assert target.is_met is None
    assert targets_table((target,)).rows == (("it", "≤ 1.20 x", "missing", "not measured"),)


def test_a_report_survives_json() -> None:
    report = Report(
        "start",
        tables=(TABLE,),
        plots=(Plot("p", "P", "x", "y", (Curve("c", ((1, 2.0), (2, Summary(1, 1, 1, 1)))),)),),
        targets=(Target("it", 1.2, None),),
        missing=("a peer",),
        took_s=1.5,
    )

    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report

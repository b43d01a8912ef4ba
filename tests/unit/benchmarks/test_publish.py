import importlib
import pkgutil
import re

import pytest
from attrs import evolve

import benchmarks
from benchmarks import __main__ as command
from benchmarks.publish import PAGE, OtherRun, UnknownMarker, beside, blocks, filled
from benchmarks.report import Machine, Report, Run, Table, Target

PAGE_TEXT = """# Times

Words before.
<!-- bench start -->
old
<!-- end -->
Words between.
<!-- bench draw -->
kept
<!-- end -->
Words after.
"""

MACHINE = Machine("6.1", "Debian", "a processor", 2, 2048, "7.2", "3.11.2", "kvm")


def run_of(*reports: Report) -> Run:
    return Run("1.0", "full", "2030-01-02T03:04:05+00:00", 0.1, MACHINE, reports)


def test_only_what_lies_between_its_markers_is_written_anew() -> None:
    page = filled(PAGE_TEXT, {"start": "new"})

    assert page == PAGE_TEXT.replace("old\n", "\nnew\n\n")


def test_to_publish_twice_changes_nothing_more() -> None:
    once = filled(PAGE_TEXT, {"start": "new", "draw": "new too"})

    assert filled(once, {"start": "new", "draw": "new too"}) == once


def test_a_table_without_a_place_is_refused() -> None:
    with pytest.raises(UnknownMarker, match="fleet"):
        filled(PAGE_TEXT, {"fleet": "lost"})


def test_targets_of_all_reports_stand_in_one_table() -> None:
    found = blocks(
        run_of(
            Report("start", targets=(Target("quick", 2, 1.0),)),
            Report("draw", targets=(Target("flat", 2, 3.0),)),
        )
    )

    assert "| quick | ≤ 2.00 | 1.00 | yes |" in found["targets"]
    assert "| flat | ≤ 2.00 | 3.00 | no |" in found["targets"]


def test_a_run_of_some_keeps_what_an_earlier_one_found_of_the_others() -> None:
    earlier = run_of(Report("start", took_s=1), Report("draw", took_s=1))
    both = beside(earlier, run_of(Report("draw", took_s=2)))

    assert [(one.benchmark, one.took_s) for one in both.reports] == [("start", 1), ("draw", 2)]


def test_figures_of_two_machines_do_not_stand_on_one_page() -> None:
    earlier = evolve(run_of(Report("start")), machine=evolve(MACHINE, processors=64))

    with pytest.raises(OtherRun, match="start is of another machine"):
        beside(earlier, run_of(Report("draw")))
    assert beside(earlier, run_of(Report("start"))).machine == MACHINE


def test_a_block_names_what_is_missing() -> None:
    report = Report("start", (Table("t", "T", ("a",), (("b",),)),), missing=("libvirt",))

    assert blocks(run_of(report))["start"].splitlines()[-1] == "Missing: libvirt."


def test_the_machine_is_told_with_the_day_and_its_load() -> None:
    words = blocks(run_of())["machine"]

    assert "2030-01-02" in words
    assert "load average before the run 0.10" in words


def test_the_page_has_a_place_for_each_benchmark() -> None:
    markers = set(re.findall(r"<!-- bench ([a-z_]+) -->", PAGE.read_text()))

    assert markers == {*command.NAMES, "machine", "targets"}


def test_each_name_of_the_command_measures() -> None:
    there = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}

    assert set(command.NAMES) <= there
    for name in command.NAMES:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure)

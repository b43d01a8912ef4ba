"""Put tables between the markers of docs/benchmarks.md, and draw its plots.

A marker is a line `<!-- bench NAME -->`; all up to the next `<!-- end -->` is written anew, and
nothing else is touched. All that stands there is kept as JSON beside the plots, so that a run of
some benchmarks can take the place of what an earlier one found on the same machine. Only here is
matplotlib imported: `./dev bench --publish` installs it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from attrs import evolve

from benchmarks.report import Machine, Plot, Report, Run, markdown, targets_table
from benchmarks.series import Summary

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
PICTURES: Final = PAGE.parent / "benchmarks"
FOUND: Final = PICTURES / "found.json"

_BLOCK: Final = re.compile(r"(<!-- bench ([a-z_]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


class UnknownMarker(Exception):
    """A report that the page has no place for."""


class OtherRun(Exception):
    """Some benchmarks' figures don't go beside those of another machine, or version."""


def publish(run: Run) -> None:
    """Raises OtherRun where what stands there can't stay beside it."""
    PICTURES.mkdir(exist_ok=True)
    if FOUND.exists():
        run = beside(msgspec.json.decode(FOUND.read_bytes(), type=Run), run)
    FOUND.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
    for report in run.reports:
        for plot in report.plots:
            draw(plot, PICTURES / f"{plot.key}.svg")
    PAGE.write_text(filled(PAGE.read_text(), blocks(run)))


def beside(earlier: Run, run: Run) -> Run:
    """What both found, the later run's where both have it. Raises OtherRun."""
    fresh = {report.benchmark for report in run.reports}
    kept = tuple(report for report in earlier.reports if report.benchmark not in fresh)
    if not kept:
        return run
    if (earlier.machine, earlier.version, earlier.effort) != (run.machine, run.version, run.effort):
        raise OtherRun(
            f"what is published of {', '.join(one.benchmark for one in kept)} is of another "
            "machine, version or effort: publish a run of all"
        )
    load = max(earlier.load_before, run.load_before)
    return evolve(run, reports=(*kept, *run.reports), load_before=load)


def blocks(run: Run) -> dict[str, str]:
    """What goes between the markers, by their name."""
    found = {report.benchmark: block(report) for report in run.reports}
    found["machine"] = machine_block(run)
    targets = tuple(target for report in run.reports for target in report.targets)
    if targets:
        found["targets"] = markdown(targets_table(targets))
    return found


def block(report: Report) -> str:
    parts = [markdown(table) for table in report.tables]
    parts += [f"![{plot.title}](benchmarks/{plot.key}.svg)" for plot in report.plots]
    parts += [f"Missing: {one}." for one in report.missing]
    return "\n\n".join(parts)


def machine_block(run: Run) -> str:
    one: Machine = run.machine
    return (
        f"kvmsec {run.version}, {run.started_at[:10]}, repeated for `{run.effort}`: "
        f"{one.distribution}, Linux {one.kernel}, QEMU {one.qemu}, Python {one.python}, "
        f"{one.accelerator}; {one.processors} x {one.processor}, "
        f"{one.memory_mib / 1024:.0f} GiB; load average before the run {run.load_before:.2f}. "
        "The figures as JSON: [found.json](benchmarks/found.json)."
    )


def filled(page: str, contents: Mapping[str, str]) -> str:
    """The page with new contents between its markers. Raises UnknownMarker."""
    there = {match[2] for match in _BLOCK.finditer(page)}
    if lost := contents.keys() - there:
        raise UnknownMarker(f"no <!-- bench {min(lost)} --> to put its tables behind")

    def fill(match: re.Match[str]) -> str:
        content = contents.get(match[2])
        return match[0] if content is None else f"{match[1]}\n{content}\n\n{match[4]}"

    return _BLOCK.sub(fill, page)


def draw(plot: Plot, path: Path) -> None:
    """One plot as SVG; the same numbers make the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = plot.key
    from matplotlib import pyplot

    height = 0.3 * len(plot.curves) + 1.2 if plot.has_bars else 4
    figure, axes = pyplot.subplots(figsize=(7, height), layout="constrained")
    if plot.has_bars:
        _draw_bars(axes, plot)
    else:
        _draw_curves(axes, plot)
    axes.set_title(plot.title)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_curves(axes: Any, plot: Plot) -> None:
    for curve in plot.curves:
        x = [at for at, _ in curve.points]
        middle, low, high = zip(*(_spread(value) for _, value in curve.points), strict=True)
        (line,) = axes.plot(x, middle, marker="o", markersize=3, label=curve.label)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    axes.legend(fontsize="small")
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.set_xscale("symlog" if plot.is_log_x else "linear")  # Nothing is a place on it, too.
    axes.set_yscale("log" if plot.is_log_y else "linear")
    if not plot.is_log_y:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def _draw_bars(axes: Any, plot: Plot) -> None:
    labels = [curve.label for curve in plot.curves]
    spreads = [_spread(curve.points[0][1]) for curve in plot.curves]
    middle = [one[0] for one in spreads]
    errors = [[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]]
    axes.barh(labels, middle, xerr=errors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(plot.y_label)


def _spread(value: Summary | float) -> tuple[float, float, float]:
    if isinstance(value, Summary):
        return value.median, value.p10, value.p90
    return value, value, value

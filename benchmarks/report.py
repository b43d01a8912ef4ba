"""What a benchmark has found: values that become text, JSON, tables and plots."""

from collections.abc import Iterator

from attrs import field, frozen

from benchmarks.series import Summary

Cell = str | int | float | Summary | None
"""None: not measured here, as where a peer isn't installed."""

MISSING = "missing"


@frozen
class Table:
    """`key` is unique among all tables; the units stand in `head`."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


Points = tuple[tuple[float, Summary | float], ...]


@frozen
class Curve:
    label: str
    points: Points


@frozen
class Plot:
    """Curves over numbers (lines) or, with `bars`, one value for each label."""

    key: str
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    is_log_x: bool = False
    is_log_y: bool = False
    has_bars: bool = False


@frozen
class Target:
    """A bound that was set, and what it was held against; `measured` None: it couldn't be."""

    what: str
    bound: float
    measured: float | None
    unit: str = ""
    at_least: bool = False

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@frozen
class Report:
    """`problems` are what a check found to be wrong, and no time: they fail a run."""

    benchmark: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    targets: tuple[Target, ...] = ()
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    took_s: float = 0.0


@frozen
class Machine:
    """What it was measured on."""

    kernel: str
    distribution: str
    processor: str
    processors: int
    memory_mib: int
    qemu: str
    python: str
    accelerator: str


@frozen
class Run:
    """All of one run."""

    version: str
    effort: str
    started_at: str
    load_before: float
    """Of the last minute, as the kernel counts it (proc_loadavg(5))."""
    machine: Machine
    reports: tuple[Report, ...] = field(default=())


def shown(cell: Cell) -> str:
    """A cell as people read it; of numbers three digits that count."""
    match cell:
        case None:
            return MISSING
        case Summary(median, p10, p90, count):
            if count == 1:
                return number(median)
            return f"{number(median)} ({number(p10)} to {number(p90)})"
        case str():
            return cell
        case int():
            return f"{cell:,}"
        case float():
            return number(cell)


def number(value: float) -> str:
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.3g}"


def markdown(table: Table) -> str:
    """A table in Markdown, under its title, with its note below it."""
    lines = [f"**{table.title}**", "", _line(table.head)]
    lines.append(_line(["---", *["--:"] * (len(table.head) - 1)]))
    lines += [_line([shown(cell) for cell in row]) for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def aligned(table: Table) -> str:
    """A table for a terminal."""
    grid = [table.head, *(tuple(map(shown, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [table.title, *("  " + "  ".join(_padded(row, widths)).rstrip() for row in grid)]
    if table.note:
        lines.append(f"  ({table.note})")
    return "\n".join(lines)


def _padded(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    for cell, width in zip(row[1:], widths[1:], strict=True):
        yield cell.rjust(width)


def targets_table(targets: tuple[Target, ...], key: str = "targets") -> Table:
    rows = tuple(
        (
            one.what,
            f"{'≥' if one.at_least else '≤'} {number(one.bound)}{one.unit}",
            MISSING if one.measured is None else f"{number(one.measured)}{one.unit}",
            {None: "not measured", True: "yes", False: "no"}[one.is_met],
        )
        for one in targets
    )
    return Table(key, "Targets", ("what", "bound", "measured", "met"), rows)

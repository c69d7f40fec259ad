"""The tables at the end: a line for each fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from examples.demo.promises import Outcome, allowance, fault, milliseconds

_LEGEND = """Took over: until the program was started on the other node; that is what is promised.
It counts from the fault, or, where the old program was asked to end, from its end.
The program's own start, until its first answer, is part of the client's outage.
"+": this machine was busy, the kernel saw processes wait for a CPU."""

_ROWS_LEGEND = """Rows acknowledged: by HTTP, since the fault before. Confirmed: by a barrier (db.sync()).
Set aside: transactions that the log lacked, says the audit log; the returned node keeps them in a file."""


def of(outcomes: Sequence[Outcome]) -> Iterator[tuple[Table, str]]:
    """Each table that has a line, and what explains it."""
    faults = [each for each in outcomes if each.rows is None]
    with_rows = [each for each in outcomes if each.rows is not None]
    if faults:
        yield _table(faults), _LEGEND
    if with_rows:
        yield _table_of_rows(with_rows), _ROWS_LEGEND


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = _new(("fault", "active", "epoch", "old program"), _TIMES)
    for each in outcomes:
        table.add_row(
            fault(each.fault).short,
            _active(each),
            f"{each.epoch_before} → {each.epoch_after}",
            each.ended,
            *_times(each),
            _verdict(each),
        )
    return table


def _table_of_rows(outcomes: Sequence[Outcome]) -> Table:
    table = _new(
        ("with a database", "active"), (*_TIMES, "rows acknowledged", "confirmed", "lost", "set aside")
    )
    for each in outcomes:
        rows = each.rows
        assert rows is not None
        counts = (rows.acknowledged, rows.confirmed, rows.lost, rows.set_aside)
        table.add_row(
            fault(each.fault).short,
            _active(each),
            *_times(each),
            *(f"{count:,}" for count in counts),
            _verdict(each),
        )
    return table


_TIMES = ("took over", "promised", "program start", "client outage")


def _new(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    table.add_column("")
    return table


def _active(outcome: Outcome) -> str:
    return f"{outcome.before} → {outcome.after or 'nobody'}"


def _times(outcome: Outcome) -> tuple[str, ...]:
    return (
        milliseconds(outcome.takeover) if outcome.takeover is not None else "—",
        _bound(outcome),
        milliseconds(outcome.program_start) if outcome.program_start is not None else "—",
        milliseconds(outcome.outage),
    )


def _verdict(outcome: Outcome) -> str:
    return "[green]kept[/]" if outcome.is_kept else "[bold red]BROKEN[/]"


def _bound(outcome: Outcome) -> str:
    bound = fault(outcome.fault).bound_seconds
    if bound is None:
        return "no failover"
    busy = allowance(outcome)
    return f"≤ {milliseconds(bound)}" + (f" + {milliseconds(busy)}" if busy > 0.05 * bound else "")

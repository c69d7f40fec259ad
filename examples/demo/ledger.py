"""What became of the rows that were acknowledged. Pure: numbers in, words out."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class SetAside(msgspec.Struct, frozen=True):
    """What a node that returned says in the audit log of what it had beyond the log.

    ``transactions``: how many, at least that many unless ``exact``; 0 where it had nothing. ``rows``: those
    in the file that it has kept, ``file``; empty where there is none.
    """

    node: str
    epoch: int
    transactions: int
    exact: bool = True
    file: str = ""
    rows: frozenset[int] = frozenset()


class Rows(msgspec.Struct, frozen=True):
    """From the fault before to this one.

    ``acknowledged``: rows; ``confirmed``: so many of them by a barrier, too, before the old program ended;
    ``lost``: so many of them the program has no more; ``set_aside``: so many transactions the audit log
    counts in the file that was kept.
    """

    acknowledged: int
    confirmed: int
    lost: int
    set_aside: int
    broken: tuple[str, ...] = ()


class Ledger:
    """Compares, fault by fault, what was acknowledged with what the program has then."""

    def __init__(self) -> None:
        self.lost: set[int] = set()
        """In all, each of which was accounted for."""
        self._latest = 0.0

    def account(
        self,
        acknowledged: Mapping[int, float],
        present: frozenset[int],
        *,
        confirmed_before: float,
        until: float,
        may_lose: bool,
        set_aside: SetAside | None,
    ) -> Rows:
        """The rows since the last call. *acknowledged*: when each row was; taken before *present* was read.

        *until*: the end of the old program, or, where it goes on, the fault; rows after it count for the next
        one. *confirmed_before*: until when the reign that the fault hit has confirmed rows.
        *may_lose*: rows that were acknowledged and not confirmed may be gone, if *set_aside* has them.
        """
        fresh = {n for n, at in acknowledged.items() if self._latest < at <= until}
        self._latest = until
        lost = {n for n in acknowledged if n not in present} - self.lost
        confirmed = {n for n, at in acknowledged.items() if at < confirmed_before}
        self.lost |= lost
        return Rows(
            acknowledged=len(fresh),
            confirmed=len(confirmed & fresh),
            lost=len(lost),
            set_aside=set_aside.transactions if set_aside else 0,
            broken=tuple(_problems(lost, confirmed, present, may_lose, set_aside)),
        )


def _problems(
    lost: set[int], confirmed: set[int], present: frozenset[int], may_lose: bool, set_aside: SetAside | None
) -> list[str]:
    problems: list[str] = []
    if gone := lost & confirmed:
        problems.append(f"rows that a barrier had confirmed are gone: {shown(gone)} (G3)")
    if not may_lose:
        if lost:
            problems.append(f"rows that were acknowledged are gone: {shown(lost)}")
        return problems
    if set_aside is None:
        return [*problems, "the node that returned did not say what it had beyond the log"]
    if missing := lost - set_aside.rows:
        problems.append(f"rows were lost that are in no file that was set aside: {shown(missing)}")
    beyond = set_aside.rows - present
    if set_aside.exact and set_aside.transactions < len(beyond):
        problems.append(
            f"{set_aside.file} has {len(beyond)} rows that the program lacks, "
            f"the audit log says {set_aside.transactions} transactions"
        )
    return problems


def shown(rows: set[int] | frozenset[int]) -> str:
    """For people."""
    first = ", ".join(str(n) for n in sorted(rows)[:5])
    return f"{first} and {len(rows) - 5} more" if len(rows) > 5 else first

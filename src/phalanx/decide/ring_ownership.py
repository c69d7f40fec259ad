"""Which partitions a node takes, acts for and gives back, given the plan and what their keys say (G6).

Each partition has a key in the app's bucket that holds {session}. It changes only when the owner changes, so
**its revision is the partition's epoch**, as the leader key's is an app's (:mod:`phalanx.decide.election`).

Invariants, each of which the simulator checks:

* A node takes a key only by compare-and-set, and only where nobody holds it or its holder's session is
  over. An ended session stays ended, so checking first and replacing after is safe, whatever the plan says.
* It acts for a partition (from Begin to ``on_ended``) only while its session is valid and the key holds that
  session, under the key's revision, which is larger than every epoch it has seen there; and never a second
  time under an epoch that has ended here.
* It gives a key back only after it has ceased to act: release, then own. An epoch that it has tried to give
  back never begins: that write may be stored at any later moment.

The plan decides who tries; two nodes that know different plans may both try, and one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from phalanx.types import SessionId


class PartitionBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a partition's key holds; the revision is the epoch and comes with the record. ``session`` None:
    it was given back."""

    session: SessionId | None = None


class Write(msgspec.Struct, frozen=True):
    """Replace the key by compare-and-set on this revision (0: create it): take it, or give it back."""

    partition: int
    expected_revision: int
    take: bool


class Read(msgspec.Struct, frozen=True):
    """Ask the stream's leader what the key holds: a refused or unanswered write proves nothing."""

    partition: int


class Begin(msgspec.Struct, frozen=True):
    """Act for the partition under this epoch from now on."""

    partition: int
    epoch: int


class End(msgspec.Struct, frozen=True):
    """Cease to act, and say so by :meth:`Ownership.on_ended`. ``hard``: at once, as the key is or may soon
    be another's; else gracefully."""

    partition: int
    epoch: int
    reason: str
    hard: bool


Action: TypeAlias = Write | Read | Begin | End


@dataclass(slots=True)
class _Partition:
    revision: int = 0
    holder: SessionId | None = None
    floor: int = 0
    """The highest epoch that was seen before ``revision``: larger than it only if servers lost writes."""
    held: int = 0
    """The epoch under which this node acts; 0: it does not."""
    ended: int = 0
    """The latest epoch that has ended here, or that was to be given back without having begun."""
    ending: bool = False
    ending_hard: bool = False
    writing: bool = False
    must_read: bool = False
    reading: bool = False
    aside: bool = False


class Ownership:
    """All partitions of one ring as one session of a node has them. Costs what changes, not what there is.

    *taken_up*: an earlier life of the node has begun the session. What it acted for has ended with it: no
    epoch that it had is gone on with.
    """

    def __init__(
        self,
        me: SessionId,
        partitions: int,
        is_over: Callable[[SessionId], bool],
        *,
        taken_up: bool = False,
    ) -> None:
        self.me, self._is_over, self._taken_up = me, is_over, taken_up
        self._partitions = [_Partition() for _ in range(partitions)]
        self._planned: Sequence[str | None] = (None,) * partitions
        self._dirty: set[int] = set(range(partitions))
        self._of_session: dict[SessionId, set[int]] = {}
        self._valid = self._may_begin = self._leaving = False

    # --- what is so

    def epoch(self, partition: int) -> int:
        """The epoch under which this node acts for *partition*; 0 if it does not, or ceases to."""
        found = self._partitions[partition]
        return 0 if found.ending else found.held

    def planned(self, partition: int) -> str | None:
        """Who shall own *partition*, by the plan."""
        return self._planned[partition]

    def holder(self, partition: int) -> tuple[int, SessionId | None]:
        """What the key says: its revision (0: never written), and whose it is."""
        found = self._partitions[partition]
        return found.revision, found.holder

    @property
    def held(self) -> list[int]:
        """The partitions for which this node acts, or ceases to act."""
        return [number for number, found in enumerate(self._partitions) if found.held]

    def is_settled(self, partition: int) -> bool:
        """Whether no write and no read of its key is under way, or due."""
        found = self._partitions[partition]
        return not (found.writing or found.must_read or found.reading)

    @property
    def is_clear(self) -> bool:
        """Whether this session holds nothing any more, as far as is known: then the node may end."""
        return not any(
            found.held or found.writing or found.must_read or found.reading or found.holder == self.me
            for found in self._partitions
        )

    def holders(self) -> Collection[SessionId]:
        """The sessions that are named by any key: those that have to be judged."""
        return self._of_session.keys()

    # --- what happened

    def on_plan(self, owners: Sequence[str | None]) -> None:
        """Who shall own each partition, by node name."""
        before, self._planned = self._planned, owners
        self._dirty.update(n for n, (old, new) in enumerate(zip(before, owners, strict=True)) if old != new)

    def on_session_over(self, session: SessionId) -> None:
        """*session* has ended, for good."""
        self._dirty.update(self._of_session.get(session, ()))

    def leave(self, leaving: bool = True) -> None:
        """Give everything back, and take nothing any more: the node ends. *leaving* False: it does not."""
        self._leaving = leaving
        self._dirty.update(range(len(self._partitions)))

    def set_aside(self, partition: int, aside: bool) -> None:
        """Leave *partition* alone for a while, whatever the plan says: it has failed here."""
        self._partitions[partition].aside = aside
        self._dirty.add(partition)

    def on_record(self, partition: int, revision: int, session: SessionId | None) -> None:
        """The watch has brought what the key holds."""
        found = self._partitions[partition]
        if revision > found.revision:
            if self._taken_up and session == self.me and not found.writing:
                found.ended = max(found.ended, revision)
            self._replace(partition, revision, session)

    def on_written(self, partition: int, revision: int, *, take: bool) -> None:
        """A :class:`Write` was stored as *revision*."""
        self._dirty.add(partition)
        self.on_record(partition, revision, self.me if take else None)
        self._partitions[partition].writing = False

    def on_not_written(self, partition: int) -> None:
        """A :class:`Write` was refused, or nobody answered."""
        found = self._partitions[partition]
        found.writing, found.must_read = False, True
        self._dirty.add(partition)

    def on_read(self, partition: int, revision: int, session: SessionId | None) -> None:
        """What the stream's leader has (0, None: nothing). It counts even if it is older than what was seen:
        servers may have lost writes. Make sure first that it was no deposed leader's answer."""
        found = self._partitions[partition]
        found.reading = found.must_read = False
        self._dirty.add(partition)
        if self._taken_up and session == self.me and revision != found.revision:
            found.ended = max(found.ended, revision)
        if revision != found.revision:
            self._replace(partition, revision, session)

    def on_not_read(self, partition: int) -> None:
        """A :class:`Read` was not answered: it will be asked again."""
        self._partitions[partition].reading = False
        self._dirty.add(partition)

    def on_reconnected(self) -> None:
        """Servers may have lost writes meanwhile: what is acted on must be found as it was written."""
        for number, found in enumerate(self._partitions):
            if found.held or found.holder == self.me:
                found.must_read = True
                self._dirty.add(number)

    def on_ended(self, partition: int) -> None:
        """The node acts for *partition* no more: nothing of it runs."""
        found = self._partitions[partition]
        found.ended = max(found.ended, found.held)
        found.held, found.ending, found.ending_hard = 0, False, False
        self._dirty.add(partition)

    def _replace(self, partition: int, revision: int, session: SessionId | None) -> None:
        found = self._partitions[partition]
        if found.holder is not None:
            self._of_session[found.holder].discard(partition)
            if not self._of_session[found.holder]:
                del self._of_session[found.holder]
        if session is not None:
            self._of_session.setdefault(session, set()).add(partition)
        found.floor = max(found.floor, found.revision)
        found.revision, found.holder = revision, session
        # Whatever is still under way there was for an earlier revision: it is this very write, or is refused.
        found.writing = False
        self._dirty.add(partition)

    # --- what to do

    def step(self, *, valid: bool, may_begin: bool) -> list[Action]:
        """What to do now. *valid*: the session is; *may_begin*: and does not run out just now.

        Report each Write, Read and End; a Begin is acted on at once.
        """
        if (valid, may_begin) != (self._valid, self._may_begin):
            self._valid, self._may_begin = valid, may_begin
            self._dirty.update(range(len(self._partitions)))
        numbers = sorted(self._dirty)
        self._dirty.clear()
        return [action for number in numbers if (action := self._next(number)) is not None]

    def _next(self, number: int) -> Action | None:
        found = self._partitions[number]
        if found.held:
            return self._end(number, found) or self._read(number, found)
        if found.writing or found.reading or found.must_read:
            return self._read(number, found)
        mine = found.holder == self.me
        wanted = self._is_wanted(number, found)
        if not self._valid or (not mine and not wanted):
            return None
        if not wanted:
            return self._write(number, found, take=False)
        if mine and found.revision > max(found.ended, found.floor):
            found.held = found.revision
            return Begin(number, found.revision)
        # A key that names this session under an epoch that has ended here is as good as released.
        if mine or found.holder is None or self._is_over(found.holder):
            return self._write(number, found, take=True)
        return None

    def _is_wanted(self, number: int, found: _Partition) -> bool:
        planned = self._planned[number] == self.me.node
        return planned and self._may_begin and not self._leaving and not found.aside

    def _end(self, number: int, found: _Partition) -> Action | None:
        lost = found.holder != self.me or found.revision != found.held
        if not lost and self._valid and self._is_wanted(number, found):
            return None
        hard = lost or not self._valid
        if found.ending and (found.ending_hard or not hard):
            return None
        found.ending, found.ending_hard = True, hard
        return End(number, found.held, self._why_ended(number, found, lost), hard)

    def _why_ended(self, number: int, found: _Partition, lost: bool) -> str:
        if lost:
            holder = found.holder.node if found.holder is not None else "nobody"
            return f"its key names {holder} at epoch {found.revision}"
        if not self._may_begin:
            return "the session runs out" if self._valid else "the session is no longer valid"
        if self._leaving:
            return "the node is stopping"
        return "it has failed here" if found.aside else f"the plan gives it to {self._planned[number]}"

    def _read(self, number: int, found: _Partition) -> Action | None:
        if found.reading or not found.must_read or found.writing:
            return None
        found.reading = True
        return Read(number)

    def _write(self, number: int, found: _Partition, *, take: bool) -> Write:
        if not take:
            # Its report may come late, or never: from here on this epoch may be given back at any moment.
            found.ended = max(found.ended, found.revision)
        found.writing = True
        return Write(number, found.revision, take)

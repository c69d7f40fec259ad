"""The member list of an app that holds: who may follow a session that is over. The leader keeps it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from phalanx.decide.hold import Claim, MemberList, wanted
from phalanx.errors import BusError, WrongRevision
from phalanx.names import MEMBERS_KEY, Names
from phalanx.ports import Bus, Fence, Record
from phalanx.types import Candidate, LeaderRecord

log = logging.getLogger("phalanx.hold")

TIMEOUT_SECONDS = 1.0

_members_of = msgspec.json.Decoder(MemberList).decode
_encode = msgspec.json.Encoder().encode


class Admission:
    """The list as this node knows it, and, while it leads, who is to be on it."""

    def __init__(self, bus: Bus, names: Names, app: str) -> None:
        self._bus, self._app = bus, app
        bucket = names.app_bucket(app)
        self._stream = names.bucket_stream(bucket)
        self.subject = names.key_subject(bucket, MEMBERS_KEY)
        self.revision = 0
        self.members: MemberList | None = None
        self.claim: Claim | None = None
        self._must_read = True

    def begin(self, claim: Claim | None) -> None:
        """This node leads now; None: no more."""
        self.claim, self._must_read = claim, True

    def learn(self, record: Record) -> None:
        """The watch tells of the list."""
        self._note(record.revision, None if record.removed else _members_of(record.data))

    def _note(self, revision: int, members: MemberList | None) -> None:
        if revision > self.revision:
            self.revision, self.members = revision, members
        # Before it was read from the stream's leader, what a watch tells may be out of date.
        if self.claim is not None and self.claim.revision >= 0:
            self.claim.on_list(revision, members)

    async def step(self, fence: Fence, offers: Iterable[Candidate]) -> bool:
        """Read the list, or add who is missing. False: try again soon."""
        claim = self.claim
        if claim is None:
            return True
        try:
            if self._must_read or claim.revision < 0:
                await self._read(claim)
            more = [(offer.session.node, offer.direct) for offer in offers]
            members = wanted(claim.members, more, claim.timing.ttl)
            if members != claim.members:
                await self._write(claim, members, fence)
        except BusError as error:
            log.debug("app %s: its member list: %s", self._app, error)
            return False
        return True

    async def read(self) -> bool:
        """Learn the list from the stream's leader, also if it is older or gone: servers may have lost writes.
        True then. Raises BusError.

        Who follows by it does that only if it is still at this revision, so an answer that is out of date
        costs no more than a refusal.
        """
        before = self.revision
        record = await self._bus.read(self._stream, self.subject, timeout=TIMEOUT_SECONDS)
        if self.revision > before:
            return False  # the watch was faster
        if record is None or record.revision < before:
            self.revision, self.members = 0, None
        if record is not None:
            self.learn(record)
        return self.revision < before

    async def _read(self, claim: Claim) -> None:
        record = await self._bus.read(self._stream, self.subject, timeout=TIMEOUT_SECONDS)
        self._must_read = False
        members = None if record is None or record.removed else _members_of(record.data)
        claim.on_list(record.revision if record is not None else 0, members)
        if record is not None:
            self.learn(record)

    async def _write(self, claim: Claim, members: MemberList, fence: Fence) -> None:
        expect = claim.sends(members)
        self._must_read = True
        try:
            revision = await self._bus.write(
                self.subject, _encode(members), expect=expect, fence=fence, timeout=TIMEOUT_SECONDS
            )
        except WrongRevision:
            return
        self._must_read = False
        self._note(revision, members)
        log.info("app %s: may be followed by %s", self._app, ", ".join(sorted(members.nodes)))


async def forget_member(bus: Bus, names: Names, app: str, node: str, leader: LeaderRecord) -> bool:
    """Take *node* off *app*'s list: never who leads, nor the last. True if it was on it. Raises BusError.

    A shorter list is safe whoever writes it: nobody follows that was not asked.
    """
    bucket = names.app_bucket(app)
    subject = names.key_subject(bucket, MEMBERS_KEY)
    record = await bus.read(names.bucket_stream(bucket), subject)
    if record is None or record.removed:
        return False
    members = _members_of(record.data)
    leads = leader.session is not None and leader.session.node == node
    if node not in members.nodes or leads or len(members.nodes) == 1:
        return False
    nodes = {name: address for name, address in members.nodes.items() if name != node}
    await bus.write(subject, _encode(msgspec.structs.replace(members, nodes=nodes)), expect=record.revision)
    return True


__all__ = ["Admission", "forget_member"]

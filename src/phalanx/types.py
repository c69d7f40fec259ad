"""The nouns that every layer shares: identities, fencing tokens, snapshots of state.

Everything here is immutable and knows nothing of NATS, of clocks or of asyncio.
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum
from typing import NewType

import msgspec

NodeId = NewType("NodeId", str)
"""A node's name, unique in its platform. A DNS label."""

Epoch = NewType("Epoch", int)
"""The fencing token of one reign over one app: the revision of its leader key. It only ever grows."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def is_dns_label(name: str) -> bool:
    """Whether *name* is a lower-case DNS label (RFC 1123): 1-63 of a-z, 0-9 and inner hyphens."""
    return _LABEL.fullmatch(name) is not None


class SessionId(msgspec.Struct, frozen=True, order=True):
    """One life of one node. The nonce is random, so an id is never used a second time."""

    node: str
    nonce: str

    @classmethod
    def new(cls, node: str) -> SessionId:
        """A session id that nobody has used before (64 random bits)."""
        return cls(node, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> SessionId:
        """The inverse of ``str()``. Raises ValueError for anything else."""
        node, separator, nonce = text.partition(".")
        if not separator or not is_dns_label(node) or not nonce:
            raise ValueError(f"not a session id: {text!r} (expected <node>.<nonce>)")
        return cls(node, nonce)

    def __str__(self) -> str:
        return f"{self.node}.{self.nonce}"


class Position(msgspec.Struct, frozen=True, order=True):
    """How far something is in an app's WAL log: the sequence there, and the last transaction up to it.

    Transactions are numbered over all reigns. 0 and 0: at the very beginning.
    """

    sequence: int = 0
    txid: int = 0

    def __str__(self) -> str:
        return f"{self.sequence}/{self.txid}"


class Role(StrEnum):
    """What a node is for one app right now."""

    STARTING = "starting"
    STANDBY = "standby"
    ACTIVATING = "activating"
    ACTIVE = "active"
    STANDING_DOWN = "standing-down"
    INELIGIBLE = "ineligible"
    """Running, but no candidate: unhealthy, stepping aside after failures, or barred by an operator."""
    STOPPED = "stopped"


class Health(StrEnum):
    """The verdict of an app's health checks on one node."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class LeaderRecord(msgspec.Struct, frozen=True):
    """What the leader key of an app says, at one revision.

    ``session`` is None when nobody leads: the key was released, or has never been written
    (then ``revision`` is 0).
    """

    revision: int
    session: SessionId | None = None
    successor: str | None = None
    nonce: str = ""
    reason: str = ""
    unfenced: tuple[SessionId, ...] = ()
    """Earlier leaders that did not end their sessions themselves, and may not have been fenced since."""
    fences: bool = False
    """The holder's node declares a fence command: whoever takes over from it has to have it fenced."""
    hold: bool = False
    """This reign may outlive its session, by the promises of its members: see :mod:`phalanx.decide.hold`."""

    @property
    def epoch(self) -> Epoch:
        """The fencing token of this reign."""
        return Epoch(self.revision)


class FenceNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """That nothing of ``session`` runs any more: the fence command of a node said so or an operator (``by``),
    at ``time`` (Unix seconds). ``said``: the command's last line. ``app``: nothing of that app, where the
    command is for each app; empty: nothing at all."""

    session: SessionId
    by: str
    time: float
    said: str = ""
    app: str = ""


class Candidate(msgspec.Struct, frozen=True):
    """A node's standing offer to lead one app. ``priority``: the higher one is preferred. ``no_failover``: it
    leads only if an operator names it."""

    session: SessionId
    eligible: bool
    priority: int = 0
    reason: str = ""
    no_failover: bool = False
    direct: str = ""
    """Where the node is reached without NATS (``host:port``), for an app that holds; empty: nowhere."""


class Nomination(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operator's word who shall follow the reign of *epoch*, and no other. ``by``: who said so."""

    epoch: int
    node: str
    by: str = ""


class Succession(msgspec.Struct, frozen=True):
    """How a node came to lead an app under *epoch*.

    ``at``: when it took the leader key, Unix seconds. ``previous``: the node that led before under
    ``previous_epoch``, empty if nobody ever had. ``how``: ``released`` (it gave the key back) or
    ``session-over`` (its session ended), empty without a previous one; ``reason``: why. ``named``: this node
    was named as the successor; ``by``: by which operator, if it was one. ``vacant_seconds``: from when this
    node knew that nobody led any more until it took the key.
    """

    epoch: int
    at: float
    previous: str = ""
    previous_epoch: int = 0
    how: str = ""
    reason: str = ""
    named: bool = False
    by: str = ""
    vacant_seconds: float = 0.0


class Member(msgspec.Struct, frozen=True):
    """A node of the platform as its member key describes it. Times are Unix seconds."""

    node: str
    session: SessionId
    since: float
    version: str
    host: str = ""
    pid: int = 0
    labels: dict[str, str] = {}
    apps: tuple[str, ...] = ()
    http: str = ""
    nats_server: str = ""
    ttl_seconds: float = 0.0
    """How long its sessions last without a renewal; 0: it does not say."""


class DatabaseState(msgspec.Struct, frozen=True):
    """An app's database on one node. ``phase``: ``following``, ``live`` or why it is neither yet.

    ``lag_seconds``: how far a replica is behind the log. ``spool_bytes``: what of a live one waits for
    the log. ``problem``: what is wrong with it, empty if nothing.
    """

    phase: str
    position: Position = Position()
    lag_seconds: float = 0.0
    spool_bytes: int = 0
    problem: str = ""


class ProgramState(StrEnum):
    """What a backend's program does."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class ProgramStatus(msgspec.Struct, frozen=True):
    """A backend's program, as status shows it. ``what``: ``process 4711``, ``unit wiki.service``,
    ``container 3f2a…``. ``since``: Unix seconds of its start. ``restarts``: in place, in this section."""

    what: str
    state: ProgramState
    since: float = 0.0
    restarts: int = 0
    detail: str = ""


class Pause(msgspec.Struct, frozen=True):
    """That an app, or the whole platform, is paused. ``since``: Unix seconds by the clock of who did it."""

    by: str
    since: float
    reason: str = ""

    def __str__(self) -> str:
        return f"paused by {self.by}" + (f": {self.reason}" if self.reason else "")


class Standing(msgspec.Struct, frozen=True):
    """What explains why an app is on a node or not, besides its role. Times are Unix seconds, 0: none.

    ``eligible``: a candidate, or active and not ill. ``aside_until``: it leaves the app to others until then,
    after ``failures`` in a row or a hand-over. ``step``: of becoming active that is under way, since
    ``step_since``. ``healthy_since``: the first healthy answer of the present active section.
    ``succession``: how the present section came about. ``named``: who is to follow a reign that has ended.
    ``ttl_seconds``: how long a node that nobody hears keeps what it leads, at most.
    """

    eligible: bool = False
    priority: int = 0
    no_failover: bool = False
    aside_until: float = 0.0
    failures: int = 0
    step: str = ""
    step_since: float = 0.0
    healthy_since: float = 0.0
    succession: Succession | None = None
    named: str = ""
    ttl_seconds: float = 0.0


class PlannedSwitchover(msgspec.Struct, frozen=True, omit_defaults=True):
    """A hand-over of *app* that the active node carries out at a time. Times are Unix seconds.

    ``to``: None leaves the choice to the moment. ``by``: who has planned it, ``made``: when.
    """

    app: str
    at: float
    to: str | None = None
    reason: str = ""
    by: str = ""
    made: float = 0.0


class RingState(msgspec.Struct, frozen=True):
    """A ring on one node. ``planned``: how many of its ``partitions`` the node shall own. ``owned``: does,
    and ``on_own`` has ended. ``moving``: more of them whose hooks run or wait, before or after that."""

    partitions: int
    weight: int = 1
    planned: int = 0
    owned: int = 0
    moving: int = 0


class PoolState(msgspec.Struct, frozen=True):
    """A pool on one node. ``replicas``: how many instances are wanted, None: all; ``declared``: by this node.
    ``scaled_by``: who has said otherwise; empty: nobody. ``seat``: that of this node, None: it has none.
    ``ready``: its instance is active and works, so that calls come to it."""

    replicas: int | None = None
    declared: int | None = None
    scaled_by: str = ""
    seat: int | None = None
    ready: bool = False


class AppStatus(msgspec.Struct, frozen=True):
    """One app on one node. ``since`` is Unix seconds: when the role was taken up. ``database``: its database
    there, None for an app without one. ``program``: what its backend runs there now, None if nothing.
    ``pause``: that of the app or of the platform, as this node knows. ``unkept``: why what is active here
    would end with the node, even in a pause; empty if it would not, or if nothing is active.
    ``health_reason``: each check that is not healthy, with what it saw last."""

    name: str
    role: Role
    health: Health = Health.UNKNOWN
    epoch: int = 0
    leader: str | None = None
    since: float = 0.0
    reason: str = ""
    database: DatabaseState | None = None
    program: ProgramStatus | None = None
    pause: Pause | None = None
    standing: Standing = Standing()
    unkept: str = ""
    health_reason: str = ""
    held_seconds: float = 0.0
    """How long it may go on although the node's session is over; 0: not at all."""
    hold: str = ""
    """Of an active app that holds: whether it goes on without NATS, or would. Empty for others."""
    pattern: str = "active-passive"
    """That of its declaration: ``active-passive``, ``ring``, ``pool``."""
    ring: RingState | None = None
    """What the node has of a ring; None for other apps."""
    pool: PoolState | None = None
    """What the node is in a pool; None for other apps."""


class NodeStatus(msgspec.Struct, frozen=True):
    """One node's own view of itself. ``session_left_seconds``: how long its session is valid still."""

    platform: str
    node: str
    version: str
    session: str = ""
    session_left_seconds: float = 0.0
    ready: bool = False
    connected: bool = False
    nats_server: str = ""
    apps: tuple[AppStatus, ...] = ()
    labels: dict[str, str] = {}
    problems: tuple[str, ...] = ()


class Resource(msgspec.Struct, frozen=True):
    """Something that runs because an app is active on a node, and that must be gone before the next one.

    It is registered with the keeper BEFORE it starts. ``kind``: ``process`` (killed by its marker
    ``id`` and process group), ``unit`` (a systemd unit), ``container`` (a Docker container), ``vip`` (an
    address on an interface), or ``section`` (code inside the node itself: only killing the node ends
    it). ``start_time`` is the process's start in clock ticks since boot, 0 where unknown.

    ``details``: what else its kind needs to be killed, see docs/storage.md. ``adoptable``: while its app is
    paused it outlives its node, whose next life takes it up again.
    """

    kind: str
    id: str
    app: str
    epoch: int
    pgid: int = 0
    start_time: int = 0
    details: dict[str, str] = {}
    adoptable: bool = False

"""Every error that Phalanx raises on purpose.

::

    PhalanxError
    ├── ConfigError               a declaration is wrong: key, value, remedy (CLI exit code 2)
    │   └── ConfigFileError       a configuration file is missing, or no TOML: line and column
    ├── StartError                a node cannot start
    │   ├── NodeIdTaken           another live node has this id
    │   ├── IdentityError         the platform in NATS is not the one that this node knows
    │   └── NatsUnusable          NATS is not reachable, has no JetStream, or refuses our rights
    ├── PlatformNotFound          NATS holds no platform of that name
    ├── StepDownFailed            nobody stepped down, or nobody took over
    │   └── SwitchoverRefused     a planned hand-over could lose something now; nothing was changed
    ├── Paused                    what was asked for would move an app that is paused
    ├── BusError                  NATS answered with an error, or not as expected
    │   ├── BusUnavailable        not connected, or nobody serves that stream just now
    │   ├── BusTimeout            no answer in time: the outcome is UNKNOWN
    │   └── WrongRevision         a compare-and-set lost: somebody else wrote
    ├── Fenced                    the write carried an old epoch; the server refused it
    ├── NotActive                 this node is not active for that app
    ├── SessionLost               the node's session is over
    ├── KeyExists                 KV create of a key that is there
    ├── WrongValue                a value can't be stored, or is not of the type that was asked for
    ├── RevisionCompacted         not all changes since a revision are there any more
    ├── CallError                 a call to an app failed: ``code``; handlers raise it with their own
    │   ├── UnknownApp            the platform has no such app
    │   ├── UnknownMethod         the app has no such handler
    │   ├── NoHandlers            the app answers no calls at all
    │   ├── WrongRoute            only the active instance answers that method
    │   ├── WrongType             the request, or the answer, is not of the declared type: ``path``
    │   ├── TooLarge, TooDeep     it does not fit into a message; it is nested too deeply
    │   ├── Busy                  as many calls as the handler takes at a time are under way
    │   ├── NoLeader, NoInstance  nobody was there to answer before the deadline; it was not begun
    │   ├── CallTimeout           not answered before the deadline
    │   ├── OutcomeUnknown        whoever had begun it is gone: it may have been carried out or not
    │   └── HandlerFailed         the handler raised something else; the log of its node says what
    ├── LockTimeout               a lock was not free before the deadline
    ├── LockLost                  a held lock is gone (with the session, or taken back)
    ├── HookFailed                a hook raised, or overran its deadline
    ├── BackendError              a backend could not be prepared, started, stopped or fenced
    ├── AddressError              a virtual address could not be taken, kept or given up
    ├── FenceFailed               a node could not be fenced, so its app is not taken over
    ├── DatabaseError             an app's database cannot be used, captured, followed or promoted
    │   ├── LtxError              an LTX file is damaged, or none
    │   ├── SyncTimeout           a commit was not confirmed before the deadline: it may survive or not
    │   └── ReplicaUnavailable    this node has no replica that can be read (yet)
    └── InternalError             a part of the node failed (a bug): it has handed over and ended

Errors carry fields, build their own message, and say what to do.
"""

from __future__ import annotations

from typing import cast


class PhalanxError(Exception):
    """The root of all errors of this package."""


def _shown(value: object) -> str:
    """A wrong value, as one short line whatever it is."""
    try:
        text = repr(value)
    except Exception as error:  # any object may be given by mistake, also one whose repr() fails
        text = f"<{type(value).__name__}, repr() failed: {type(error).__name__}>"
    return _one_line(text)


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text[:200])
    return text if len(text) <= 120 else f"{text[:119]}…"


class ConfigError(PhalanxError):
    """A declaration is wrong. ``str()`` is one line: key, value, what is wrong, the remedy."""

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{_one_line(key)} = {_shown(value)}: {problem}; {remedy}")


class ConfigFileError(ConfigError):
    """A file that cannot be read, or is no TOML. ``line`` and ``column`` count from 1 (0: unknown)."""

    def __init__(self, path: str, line: int, column: int, problem: str, remedy: str) -> None:
        self.line, self.column = line, column
        super().__init__(path, None, problem, remedy)
        place = f"{_one_line(path)}:{line}:{column}" if line else _one_line(path)
        self.args = (f"{place}: {problem}; {remedy}",)


class StartError(PhalanxError):
    """A node cannot start. ``remedy`` says what to do about it."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}; {remedy}")


class NodeIdTaken(StartError):
    """A live session already holds this node id."""

    def __init__(self, node: str, session: str, host: str) -> None:
        self.node, self.session, self.host = node, session, host
        super().__init__(
            f"node id {node!r} is taken by session {session} on host {host or 'unknown'}",
            "stop that node or start this one under another id (node = ...)",
        )


class IdentityError(StartError):
    """The platform found in NATS is not the one that this node belongs to, or lost a part."""


class NatsUnusable(StartError):
    """NATS cannot be reached, or cannot do what Phalanx needs."""


class PlatformNotFound(PhalanxError):
    """NATS answers, but holds no platform of that name."""

    def __init__(self, platform: str, where: str) -> None:
        self.platform, self.where = platform, where
        super().__init__(
            f"there is no platform {platform!r} in NATS at {where}; "
            "check the name and the servers, or start its first node"
        )


class StepDownFailed(PhalanxError):
    """An app was asked to step down, and nobody did; or it did, and nobody took over in time."""

    def __init__(self, app: str, problem: str, remedy: str) -> None:
        self.app, self.problem, self.remedy = app, problem, remedy
        super().__init__(f"app {app!r}: {problem}; {remedy}")


class Paused(PhalanxError):
    """What was asked for would move an app that is paused. ``whole``: its platform is, with all its apps."""

    def __init__(self, app: str, pause: str, *, whole: bool = False) -> None:
        self.app, self.pause, self.whole = app, pause, whole
        command = "phalanx resume" if whole else f"phalanx resume {app}"
        super().__init__(f"app {app!r} is {pause}; resume it first: {command}")


class SwitchoverRefused(StepDownFailed):
    """A planned hand-over would not be lossless, or could not be carried out now. Nothing was changed."""


class BusError(PhalanxError):
    """NATS refused a request. ``code`` is the JetStream error code, 0 where there is none."""

    def __init__(self, operation: str, description: str, code: int = 0) -> None:
        self.operation, self.description, self.code = operation, description, code
        super().__init__(f"{operation}: {description}" + (f" (NATS error {code})" if code else ""))


class BusUnavailable(BusError):
    """Not connected, or no server answers for that stream. Nothing was written."""


class BusTimeout(BusError):
    """No answer in time. Whether the request was carried out is unknown: read back."""


class StreamGone(BusError):
    """A stream was there once and is no more: deleted, or lost by NATS. It is never made anew silently."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        problem = "gone, though it was created once; restore it from a backup, or see docs/operations.md"
        super().__init__(f"the stream {stream!r}", problem, 10059)


class WrongRevision(BusError):
    """A compare-and-set was refused. ``actual`` is the revision the server named, None if it did not."""

    def __init__(self, subject: str, expected: int, actual: int | None) -> None:
        self.subject, self.expected, self.actual = subject, expected, actual
        super().__init__(f"write {subject}", f"expected revision {expected}, the server has {actual}", 10071)


class Fenced(PhalanxError):
    """The server refused a write because its epoch is not that of the present leader."""

    def __init__(self, app: str, epoch: int) -> None:
        self.app, self.epoch = app, epoch
        super().__init__(
            f"app {app!r}: epoch {epoch} is over, the write was refused by the server; "
            "stop this work, another node leads (or will)"
        )


class NotActive(PhalanxError):
    """This node is not active for that app."""

    def __init__(self, app: str) -> None:
        self.app = app
        super().__init__(f"app {app!r} is not active on this node; use ctx only inside its active section")


class SessionLost(PhalanxError):
    """The node's session is over; all that hung on it has ended."""

    def __init__(self, session: str, reason: str) -> None:
        self.session, self.reason = session, reason
        super().__init__(f"session {session} is over: {reason}")


class KeyExists(PhalanxError):
    """KV create found the key present."""

    def __init__(self, key: str, revision: int | None) -> None:
        self.key, self.revision = key, revision
        super().__init__(f"key {key!r} exists already; use put(), or update() with its revision")


class WrongValue(PhalanxError):
    """A KV value cannot be stored, or what is stored is not of the type that was asked for."""

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(f"key {key!r}: {_one_line(problem)}; {remedy}")


class RevisionCompacted(PhalanxError):
    """A watch since *revision* cannot give every change: some may be gone. ``key``: one of which that is
    so, empty where it is the whole bucket."""

    def __init__(self, key: str, revision: int, problem: str) -> None:
        self.key, self.revision, self.problem = key, revision, problem
        super().__init__(
            f"KV changes after revision {revision}: {f'key {key!r}: ' if key else ''}{problem}; "
            "read the present state again (a watch without since), or raise kv_history"
        )


class CallError(PhalanxError):
    """A call to an app failed. A handler raises it to answer with a code of its own::

        raise CallError("sold-out", "nothing is left of it", details={"item": 7})

    ``code``: a word for programs, as on the wire (docs/calls.md). ``message``: for people. ``started``:
    whether the handler may have begun; if not, trying again repeats nothing. ``path``: where in the request
    (``$.items[0]``) the reason lies, ``details``: more for programs, ``node``: who answered; each empty or
    None where there is none.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        app: str = "",
        method: str = "",
        node: str = "",
        path: str = "",
        started: bool = True,
        details: object = None,
    ) -> None:
        self.code, self.message, self.app, self.method = code, _one_line(message), app, method
        self.node, self.path, self.started, self.details = node, path, started, details
        where = f"call {app}.{method}: " if app else ""
        super().__init__(f"{where}{self.message} ({code})")


class UnknownApp(CallError):
    """The platform has no app of that name."""


class UnknownMethod(CallError):
    """The app has no handler of that name."""


class NoHandlers(CallError):
    """The app declares no handlers at all."""


class WrongRoute(CallError):
    """Only the active instance answers that method, and this was another one."""


class WrongType(CallError):
    """A request or an answer is not of the declared type, or of no known content type; ``path``: where."""


class TooLarge(CallError):
    """A request or an answer does not fit into one message of the server (its ``max_payload``)."""


class TooDeep(CallError):
    """A request or an answer is nested too deeply."""


class Busy(CallError):
    """As many calls are under way as the handler takes at a time, and were until the deadline."""


class NoLeader(CallError):
    """No node was active for the app before the deadline. The call was not begun."""


class NoInstance(CallError):
    """No node was there to answer before the deadline. The call was not begun."""


class CallTimeout(CallError):
    """No answer before the deadline. Unless ``started`` is false the call may have been carried out."""


class OutcomeUnknown(CallError):
    """Whoever had begun the call lost its leadership or its connection: it may have been carried out.

    Not repeated by itself, as it was not declared idempotent.
    """


class HandlerFailed(CallError):
    """The handler raised an error that is none of these. The log of its node has the traceback."""


class EventError(PhalanxError):
    """An event cannot be published, read or handled as asked. ``remedy`` says what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(problem + (f"; {remedy}" if remedy else ""))


class EventsLost(EventError):
    """Events that a subscription or a durable consumer had not seen yet were dropped: they were older than
    ``max_age`` of the app's events, or more than ``max_bytes``. ``first`` to ``last``: between these
    sequences."""

    def __init__(self, what: str, first: int, last: int) -> None:
        self.first, self.last = first, last
        super().__init__(
            f"{what}: events between sequences {first} and {last} were dropped before they were seen",
            "let the consumer catch up sooner, or raise max_age and max_bytes of the app's events",
        )


class LockTimeout(PhalanxError):
    """The lock was held by somebody else until the deadline."""

    def __init__(self, name: str, seconds: float, holder: str) -> None:
        self.name, self.seconds, self.holder = name, seconds, holder
        super().__init__(f"lock {name!r} was not free within {seconds:g} s; held by {holder or 'unknown'}")


class LockLost(PhalanxError):
    """A lock that this process held is gone."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"lock {name!r} was lost: {reason}; do not go on with what it protected")


class HookFailed(PhalanxError):
    """A hook raised or overran. ``__cause__`` holds the exception where there was one."""

    def __init__(self, app: str, hook: str, problem: str) -> None:
        self.app, self.hook, self.problem = app, hook, problem
        super().__init__(f"app {app!r}: hook {hook} {problem}")


class BackendError(PhalanxError):
    """A backend failed at one step: prepare, start, ready, stop, kill, fence."""

    def __init__(self, app: str, step: str, problem: str, remedy: str = "") -> None:
        self.app, self.step, self.problem, self.remedy = app, step, problem, remedy
        super().__init__(f"app {app!r}: backend {step}: {problem}" + (f"; {remedy}" if remedy else ""))


class AddressError(PhalanxError):
    """A virtual address failed at one step: prepare, probe, acquire, keep, release."""

    def __init__(self, app: str, address: str, step: str, problem: str, remedy: str = "") -> None:
        self.app, self.address, self.step, self.problem, self.remedy = app, address, step, problem, remedy
        super().__init__(
            f"app {app!r}: address {address} {step}: {problem}" + (f"; {remedy}" if remedy else "")
        )


class FenceFailed(PhalanxError):
    """The fence command did not confirm that *node* is fenced; what it last said is in ``problem``."""

    def __init__(self, app: str, node: str, problem: str) -> None:
        self.app, self.node, self.problem = app, node, problem
        super().__init__(
            (f"app {app!r}: " if app else "")
            + f"node {node} is not fenced: {problem}; see that it is off, then: phalanx fence "
            f"{node} --confirm-off"
        )


class DatabaseError(PhalanxError):
    """Something about an app's database. ``remedy`` says what to do about it, where that is known."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(problem + (f"; {remedy}" if remedy else ""))


class LtxError(DatabaseError):
    """An LTX file is damaged, or is none."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"LTX file: {problem}")


class DiskFull(DatabaseError):
    """There is no room for something in *folder*. Nothing is wrong with what was to be put there."""

    def __init__(self, folder: object, what: str, needed_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        super().__init__(
            f"the disk of {folder} has no room for {what}, which needs {max(1, needed_bytes >> 20)} MiB",
            "make room there, or choose another place",
        )


class SyncTimeout(DatabaseError):
    """``db.sync()`` was not confirmed in time. The commits are in the local database; whether they survive
    the loss of this node is unknown."""

    def __init__(self, app: str, seconds: float, waited_for: str) -> None:
        self.app, self.seconds, self.waited_for = app, seconds, waited_for
        super().__init__(
            f"app {app!r}: the commits were not confirmed within {seconds:g} s: waited for {waited_for}",
            "try again, or see: phalanx db status",
        )


class ReplicaUnavailable(DatabaseError):
    """There is no replica to read on this node, or it has not got so far within the deadline."""

    def __init__(self, app: str, problem: str) -> None:
        self.app = app
        super().__init__(f"app {app!r}: {problem}", "see: phalanx db status")


def _only(error: BaseException) -> BaseException:
    """What a task group has wrapped, where it is only one."""
    while isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        if len(group.exceptions) != 1:
            return group
        error = group.exceptions[0]
    return error


class InternalError(PhalanxError):
    """A part of a running node failed. The node has handed its apps over and ended; ``__cause__``: why."""

    def __init__(self, part: str, error: BaseException) -> None:
        self.part = part
        error = _only(error)
        super().__init__(
            f"internal error in {part}: {type(error).__name__}: {_one_line(str(error))}; "
            "the node has ended: start it again, and report this with its log"
        )

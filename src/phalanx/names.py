"""Every name that Phalanx uses in NATS. Nothing else spells a subject, a stream or a bucket.

Platform, app and node names are DNS labels, so ``_`` and ``.`` can separate them.
See docs/storage.md for what each of these holds.
"""

from __future__ import annotations

import base64

from phalanx.types import SessionId

RESERVED_APPS = frozenset({"platform", "services", "events", "audit", "dead"})
"""App names that would collide with the platform's own buckets and streams."""

LEADER_KEY = "election.leader"
FENCE_KEY = "fence"
CANDIDATE_KEYS = "election.candidate"
NOMINATION_KEY = "election.nomination"
MEMBERS_KEY = "election.members"
SWITCHOVER_KEYS = "switchover"
RING_KEYS = "ring"
RING_PLAN_KEY = "ring.plan"
POOL_KEYS = "pool"
POOL_SCALE_KEY = "pool.scale"


class Names:
    """The names of one platform."""

    def __init__(self, platform: str) -> None:
        self.platform = platform
        self.platform_bucket = f"{platform}_platform"
        self.audit_stream = f"{platform}_audit"
        self.audit_subjects = f"{platform}._.audit.>"

    def takes_answers(self, reply: str) -> bool:
        """Whether *reply*, which whoever asks has chosen, may be answered. Not so what the platform, KV or
        JetStream's API listen to: a node may write there what who asks may not."""
        return bool(reply) and not reply.startswith(("$", f"{self.platform}."))

    # --- KV buckets: a bucket B is the stream KV_B with subjects $KV.B.<key> (NATS ADR-8)

    def app_bucket(self, app: str) -> str:
        """The bucket of one app: leader key, candidates, its KV and its locks."""
        return f"{self.platform}_{app}"

    @staticmethod
    def bucket_stream(bucket: str) -> str:
        """The stream behind a bucket."""
        return f"KV_{bucket}"

    @staticmethod
    def key_subject(bucket: str, key: str) -> str:
        """The subject that stores *key* of *bucket*."""
        return f"$KV.{bucket}.{key}"

    def watch_prefix(self, app: str | None) -> str:
        """Where an app's bucket (None: the platform's) republishes: ``<prefix>.<key>``."""
        return f"{self.platform}.{app or '_'}.watch.kv"

    # --- the WAL log of an app, and its object store: bucket B is the stream OBJ_B (NATS ADR-20)

    def wal_stream(self, app: str) -> str:
        """The log of what an app's transactions have changed."""
        return f"{self.platform}_{app}_wal"

    def wal_subjects(self, app: str) -> str:
        """All that is in that log."""
        return f"{self.platform}.{app}.wal.>"

    def wal_record_subject(self, app: str) -> str:
        """Where records go: one LTX file each."""
        return f"{self.platform}.{app}.wal.ltx"

    def wal_seal_subject(self, app: str) -> str:
        """Where seals go: the limits between reigns."""
        return f"{self.platform}.{app}.wal.seal"

    def wal_claim_subject(self, app: str) -> str:
        """Where a new leader stops an old one that writes so fast that no seal gets in."""
        return f"{self.platform}.{app}.wal.claim"

    def wal_watch(self, app: str) -> str:
        """Where that log republishes, as a subject prefix."""
        return f"{self.platform}.{app}.watch.wal"

    def snapshots_bucket(self, app: str) -> str:
        """The object store of an app: snapshots, and records too large for a message."""
        return f"{self.platform}_{app}_snapshots"

    @staticmethod
    def object_stream(bucket: str) -> str:
        """The stream behind an object store."""
        return f"OBJ_{bucket}"

    @staticmethod
    def object_chunks(bucket: str, nuid: str) -> str:
        """Where the content of the object with that id lies (``*``: of all)."""
        return f"$O.{bucket}.C.{nuid}"

    @staticmethod
    def object_entry(bucket: str, name: str) -> str:
        """Where it is told what the object with that name is."""
        return f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    @staticmethod
    def object_entries(bucket: str) -> str:
        """The same of all objects."""
        return f"$O.{bucket}.M.>"

    # --- sessions: number n lives in stream <platform>_sessions_<n>

    def session_stream(self, number: int) -> str:
        """The session stream with that number. Numbers of replaced streams are not used again."""
        return f"{self.platform}_sessions_{number}"

    def session_number(self, stream: str) -> int:
        """The inverse of :meth:`session_stream`."""
        return int(stream.removeprefix(f"{self.platform}_sessions_"))

    def session_subject(self, stream: str, session: SessionId) -> str:
        """Where *session* keeps its key in that session stream."""
        return f"{self.platform}._.session.{self.session_number(stream)}.{session}"

    def session_subjects(self, stream: str) -> str:
        """All subjects of that session stream."""
        return f"{self.platform}._.session.{self.session_number(stream)}.>"

    def session_watch(self, stream: str) -> str:
        """Where that session stream republishes, as a subject prefix."""
        return f"{self.platform}._.watch.session.{self.session_number(stream)}"

    @staticmethod
    def session_of(subject: str) -> SessionId:
        """The session that a session subject (or its republished form) is about."""
        node, nonce = subject.rsplit(".", 2)[1:]
        return SessionId(node, nonce)

    # --- a stream that `phalanx doctor` makes and deletes

    def scratch_stream(self, token: str) -> str:
        """A stream that nothing else uses, made to see whether that can be done."""
        return f"{self.platform}_doctor_{token}"

    def scratch_subject(self, token: str) -> str:
        """What that stream stores."""
        return f"{self.platform}._.doctor.{token}"

    # --- keys of the platform's bucket

    IDENTITY_KEY = "identity"
    DIRECT_KEY = "direct"
    SESSIONS_KEY = "sessions"
    SETUP_KEY = "setup"
    PAUSE_KEY = "pause"

    @staticmethod
    def member_key(node: str) -> str:
        """Who has that node id."""
        return f"member.{node}"

    @staticmethod
    def app_key(app: str) -> str:
        """That an app was created once; its bucket must exist from then on."""
        return f"app.{app}"

    @classmethod
    def pause_key(cls, app: str) -> str:
        """That the app (empty: the platform) is paused. No app is called "pause" without a name after it."""
        return f"{cls.PAUSE_KEY}.{app}" if app else cls.PAUSE_KEY

    @staticmethod
    def fenced_key(node: str, app: str = "") -> str:
        """That a session of that node runs nothing any more, or nothing of *app*."""
        return f"fenced.{node}.{app}" if app else f"fenced.{node}"

    @staticmethod
    def database_key(app: str) -> str:
        """That the app's WAL log and object store were created once; they must exist from then on."""
        return f"database.{app}"

    @staticmethod
    def events_key(app: str) -> str:
        """That the stream of the app's events was created once; it must exist from then on."""
        return f"events.{app}"

    @staticmethod
    def switchover_key(app: str) -> str:
        """A planned hand-over of that app."""
        return f"{SWITCHOVER_KEYS}.{app}"

    @staticmethod
    def candidate_key(node: str) -> str:
        """A node's offer to lead the app in whose bucket this key lies."""
        return f"{CANDIDATE_KEYS}.{node}"

    @staticmethod
    def lock_key(kind: str, name: str) -> str:
        """Who holds that lock or semaphore of the app, or the platform, in whose bucket this key lies."""
        return f"{kind}.{name}"

    @staticmethod
    def ring_member_key(node: str) -> str:
        """A node's offer to own partitions of the ring in whose bucket this key lies."""
        return f"{RING_KEYS}.member.{node}"

    @staticmethod
    def partition_key(partition: int) -> str:
        """Who owns that partition of the ring."""
        return f"{RING_KEYS}.part.{partition}"

    @staticmethod
    def pool_member_key(node: str) -> str:
        """A node's offer to be an active instance of the pool in whose bucket this key lies."""
        return f"{POOL_KEYS}.member.{node}"

    @staticmethod
    def seat_key(seat: int) -> str:
        """Who owns that seat of the pool: its active instances are those who own one."""
        return f"{POOL_KEYS}.seat.{seat}"

    # --- core subjects

    def audit_subject(self, category: str, action: str) -> str:
        """Where an audit entry goes."""
        return f"{self.platform}._.audit.{category}.{action}"

    def status_subject(self) -> str:
        """Every node answers a request here with its NodeStatus."""
        return f"{self.platform}._.control.status"

    def control_subject(self, app: str, action: str) -> str:
        """Only the active node of *app* serves these, for example ``stepdown``."""
        return f"{self.platform}._.control.app.{app}.{action}"

    def ring_prepare_subject(self, app: str, node: str) -> str:
        """Where a node is asked to get ready for a partition of that ring."""
        return f"{self.platform}._.control.ring.{app}.prepare.{node}"

    def database_subject(self, app: str, action: str, node: str | None = None) -> str:
        """Where all nodes with that app's database, or just *node*, answer, for example ``status``."""
        return f"{self.platform}._.control.db.{app}.{action}" + (f".{node}" if node else "")

    def confirm_subject(self, app: str) -> str:
        """Standbys answer here once they have an app's log on disk up to some sequence."""
        return f"{self.platform}.{app}.db.confirm"

    # --- events: those of an app, and (app None) those of the whole platform

    def events_stream(self, app: str | None) -> str:
        """The stream of an app's own events; None: of the platform's."""
        return f"{self.platform}_{app}_events" if app else f"{self.platform}_events"

    def event_subject(self, app: str | None, subject: str) -> str:
        """Where the event *subject* (``user.created``, ``user.>``) goes."""
        return f"{self.platform}.{app or '_'}.events.{subject}"

    def event_of(self, subject: str) -> str:
        """The inverse of :meth:`event_subject`."""
        return subject.split(".", 3)[3]

    def event_watch(self, app: str | None, pattern: str = ">") -> str:
        """Where the stream republishes events, once they are stored: ``…watch.events.user.created``."""
        return f"{self.platform}.{app or '_'}.watch.events.{pattern}"

    def event_fence_subject(self, app: str) -> str:
        """Where each new leader of *app* leaves its mark among the app's events, before it is active."""
        return f"{self.platform}.{app}.fence.events"

    def event_inbox(self, app: str, token: str) -> str:
        """Where a consumer's events are delivered to, of any of its requests."""
        return f"{self.platform}.{app}.deliver.{token}.*"

    def durable_name(self, app: str, durable: str, *, of_platform: bool) -> str:
        """The consumer behind *durable* of *app*. Neither name holds an underscore."""
        return f"{app}_{durable}" if of_platform else durable

    @property
    def dead_stream(self) -> str:
        """The events that handlers could not handle, of all apps."""
        return f"{self.platform}_dead"

    @property
    def dead_subjects(self) -> str:
        """All that is in it: ``<platform>.<app>.dead.<durable>.<subject>``."""
        return f"{self.platform}.*.dead.>"

    def dead_subject(self, app: str, durable: str = "*", subject: str = ">") -> str:
        """Where the dead letters of *durable* of *app* go."""
        return f"{self.platform}.{app}.dead.{durable}.{subject}"

    # --- calls between apps: ``<platform>._.api.<app>.<route>.<method>``

    def call_subjects(self, app: str) -> str:
        """All that has to do with calls to *app*."""
        return f"{self.platform}._.api.{app}.>"

    def call_leader_subject(self, app: str, method: str = "*") -> str:
        """A call to the active instance, for callers that know no more; ``*``: all methods."""
        return f"{self.platform}._.api.{app}.leader.{method}"

    def call_any_subject(self, app: str, method: str = "*") -> str:
        """A call to any instance that is ready: they form one queue group."""
        return f"{self.platform}._.api.{app}.any.{method}"

    def call_node_subject(self, app: str, node: str, method: str = "*") -> str:
        """A call to the instance on one node."""
        return f"{self.platform}._.api.{app}.node.{node}.{method}"

    def call_partition_subject(self, app: str, partition: int | str, method: str = "*") -> str:
        """A call to the owner of one partition of a ring (``*``: of any)."""
        return f"{self.platform}._.api.{app}.part.{partition}.{method}"

    def call_queue(self, app: str) -> str:
        """The queue group of its instances, of which one answers."""
        return f"{self.platform}.{app}"

    def call_who_subject(self, app: str) -> str:
        """Any instance answers here who leads the app, and which methods may be repeated."""
        return f"{self.platform}._.api.{app}.who"

    def call_cancel_subject(self, app: str) -> str:
        """Where callers say that they no longer wait for a call."""
        return f"{self.platform}._.api.{app}.cancel"

    def many_subject(self, call_subject: str) -> str:
        """For a call that *call_subject* is for, if it has many answers. Guests' accounts have to know which
        requests those are: the server keeps what it needs for their answers until much later."""
        prefix = f"{self.platform}._."
        return f"{prefix}many.{call_subject.removeprefix(f'{prefix}api.')}"

    def call_all_subject(self, app: str, method: str = "*") -> str:
        """A call to all instances of *app*, for :meth:`many_subject`."""
        return f"{self.platform}._.api.{app}.all.{method}"

    def call_flow_subject(self, app: str, node: str) -> str:
        """Where callers of streams say to the instance on one node how many items they take."""
        return f"{self.platform}._.api.{app}.flow.{node}"

    def leader_watch_subject(self, app: str) -> str:
        """Where the leader key of *app* is republished."""
        return f"{self.watch_prefix(app)}.{LEADER_KEY}"

    def partition_watch_subject(self, app: str) -> str:
        """Where the keys of a ring's partitions are republished, by number."""
        return f"{self.watch_prefix(app)}.{RING_KEYS}.part.*"

    @staticmethod
    def service_subject(verb: str, name: str = "", instance: str = "") -> str:
        """The NATS micro protocol (ADR-32): PING, INFO or STATS of all services, of one, of one instance."""
        return ".".join(part for part in ("$SRV", verb, name, instance) if part)

    @staticmethod
    def last_token(subject: str) -> str:
        """What follows the last dot: the method of a call."""
        return subject.rpartition(".")[2]

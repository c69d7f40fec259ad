"""The nats-server configuration that makes the server itself hold apps apart (``phalanx nats permissions``).

``<platform>-node``, in the platform's account
    What nodes and their keepers log in with. May do anything in that account: they create streams,
    elect, steer and fence for every app. All streams and buckets live there.
``<platform>-app-<app>``, each in an account of its own
    For programs outside the nodes that work with one app's KV, locks, events and API, and with the platform's
    events. (What runs *inside* a node uses the node's connection.) May write ``kv.``, ``lock.`` and
    ``semaphore.`` keys of the app's bucket, never ``election.`` keys: who leads is the nodes' business. May
    read the whole bucket.
``<platform>-operator``, in an account of its own
    For people at the command line, and for ``Platform.client``: reads everything, asks nodes to act, writes
    what an operator decides (pauses, planned switchovers, fence notes, restores, the scale of pools, locks
    that are taken away). It cannot write what nodes decide: leader keys, candidacies, sessions, logs; nor
    make or delete streams.
``<platform>-viewer``, in an account of its own
    For dashboards: reads the platform's state and audit log.

Why accounts, when users with permissions would be shorter: the server does not check the *reply* subject
of a message against permissions. In one account a user who may send any request to JetStream can have
the answer, filled from his own bucket, delivered to another app's key, and it is stored (tried with
2.15.1). Across accounts the server replaces the reply subject, so an answer can only come back to the
asker's own account. It also makes inboxes private. The permissions are there as well: they make a
refusal an error that the client sees, where an import that is missing would only be silence.

A guest reaches JetStream as if it were in a domain with the platform's name: in nats-py
``client.jetstream(domain="prod")``, with the CLI ``nats --js-domain prod``. The operator, whose client is
ours, reaches it under its own name: his account imports the whole API, and his permissions alone say what of
it he may use. An account that imports less than ``$JS.API.>`` is answered by its own, missing JetStream.

No consumers for app users: a push consumer delivers to any subject of the account. They watch through
the bucket's republished subjects and direct gets, as Phalanx itself does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from phalanx.errors import ConfigError
from phalanx.names import POOL_SCALE_KEY, RESERVED_APPS, Names
from phalanx.types import is_dns_label

_WHOLE_API = "$JS.API.>"
_RESTORE_KEY = "db.restore"
"""As in data.status, which the bus cannot import."""
_WORDS = (_RESTORE_KEY, POOL_SCALE_KEY)
"""What an operator may say in the bucket of an app."""

_HEADER = """\
# Accounts and permissions of the Phalanx platform {platform}, for nats-server 2.15.
# Save it beside the server's configuration and write there: include "<this file>"
# Passwords come from the server's environment. Put double quotes inside each value, for example
#   export {variable}='"correct horse battery staple"'
# because nats-server would read a bare 10k as the number 10000. A missing variable is an error.
"""


def node_user(platform: str) -> str:
    """The user that the nodes of *platform* log in as."""
    return f"{platform}-node"


def app_user(platform: str, app: str) -> str:
    """The user, and its account, for programs outside the nodes that belong to *app*."""
    return f"{platform}-app-{app}"


def viewer_user(platform: str) -> str:
    """The user, and its account, that may only look."""
    return f"{platform}-viewer"


def operator_user(platform: str) -> str:
    """The user, and its account, for people who operate the platform."""
    return f"{platform}-operator"


def password_variable(app: str) -> str:
    """The environment variable with the password of an app's user: ``PHALANX_APP_<APP>_PASSWORD``."""
    # Names hold no underscore, so no two apps share a variable.
    return f"PHALANX_APP_{app.upper().replace('-', '_')}_PASSWORD"


NODE_PASSWORD_VARIABLE = "PHALANX_NODE_PASSWORD"
OPERATOR_PASSWORD_VARIABLE = "PHALANX_OPERATOR_PASSWORD"
VIEWER_PASSWORD_VARIABLE = "PHALANX_VIEWER_PASSWORD"


class _Guest(msgspec.Struct, frozen=True):
    """An account that sees a part of the platform's account. ``gathers``: services with many answers.

    ``api``: what it may ask of JetStream under its own name; the account imports all of that then.
    """

    name: str
    variable: str
    services: tuple[str, ...]
    gathers: tuple[str, ...]
    streams: tuple[str, ...]
    api: tuple[str, ...] = ()


def render(
    platform: str,
    apps: Sequence[str],
    *,
    calls: Mapping[str, Sequence[str]] | None = None,
    passwords: Mapping[str, str] | None = None,
) -> str:
    """The configuration text for *platform* with these *apps*: an ``accounts`` block.

    *calls*: which other apps' APIs a user of an app may call, besides its own. *passwords*: by user
    name; a user that is not in it gets a reference to its environment variable.
    Raises ConfigError for a name that cannot be one, or is there twice.
    """
    calls, passwords = calls or {}, passwords or {}
    _check(platform, apps, calls)
    names = Names(platform)
    guests = [_app_guest(names, app, calls.get(app, ())) for app in apps]
    guests += [_operator_guest(names, apps), _viewer_guest(names)]
    node = _login(node_user(platform), NODE_PASSWORD_VARIABLE, passwords)
    lines = [
        _HEADER.format(platform=platform, variable=NODE_PASSWORD_VARIABLE),
        "accounts {",
        f'  "{platform}" {{',
        "    jetstream: enabled",
        f"    users: [ {{ {node} }} ]",
        "    exports: [",
        *_exports(guests),
        "    ]",
        "  }",
        *(line for guest in guests for line in _account(guest, platform, passwords)),
        "}",
        "",
    ]
    return "\n".join(lines)


def _check(platform: str, apps: Sequence[str], calls: Mapping[str, Sequence[str]]) -> None:
    label = "use 1-63 of a-z, 0-9 and inner hyphens"
    if not is_dns_label(platform):
        raise ConfigError("platform", platform, "not a DNS label", label)
    for app in (*apps, *(called for each in calls.values() for called in each)):
        if not is_dns_label(app):
            raise ConfigError("apps", app, "not a DNS label", label)
        if app in RESERVED_APPS:
            raise ConfigError("apps", app, "the name is reserved", "choose another name")
    for app in apps:
        if list(apps).count(app) > 1:
            raise ConfigError("apps", app, "named twice", "name each app once")
    for app in calls:
        if app not in apps:
            raise ConfigError(
                "calls", app, "not among the apps", f"name one of {', '.join(apps) or '(none)'}"
            )


# --- who may do what


def _app_guest(names: Names, app: str, calls: Sequence[str]) -> _Guest:
    bucket = names.app_bucket(app)
    stream = names.bucket_stream(bucket)
    called = dict.fromkeys((app, *calls))
    return _Guest(
        name=app_user(names.platform, app),
        variable=password_variable(app),
        services=(
            names.key_subject(bucket, "kv.>"),
            names.key_subject(bucket, "lock.>"),
            names.key_subject(bucket, "semaphore.>"),
            *_single_reads(stream),
            *(names.call_subjects(each) for each in called),
            *(names.event_subject(each, ">") for each in (app, None)),
            *(read for each in (app, None) for read in _single_reads(names.events_stream(each))),
        ),
        gathers=(
            *(names.many_subject(names.call_subjects(each)) for each in called),
            *_batch_reads(stream),
            *(read for each in (app, None) for read in _batch_reads(names.events_stream(each))),
            *_discovery(called),
        ),
        streams=(
            f"{names.watch_prefix(app)}.>",
            f"{names.platform}.{app}.watch.wal.>",
            *(names.event_watch(each) for each in (app, None)),
            # Who leads the apps that it calls, so that calls find the next leader at once.
            *(names.leader_watch_subject(each) for each in called if each != app),
            *(names.partition_watch_subject(each) for each in called if each != app),
        ),
    )


def _viewer_guest(names: Names) -> _Guest:
    streams = (names.audit_stream, names.bucket_stream(names.platform_bucket))
    return _Guest(
        name=viewer_user(names.platform),
        variable=VIEWER_PASSWORD_VARIABLE,
        services=tuple(subject for stream in streams for subject in _single_reads(stream)),
        gathers=(
            names.status_subject(),
            *(subject for stream in streams for subject in _batch_reads(stream)),
        ),
        streams=(names.audit_subjects, f"{names.watch_prefix(None)}.>"),
    )


def _operator_guest(names: Names, apps: Sequence[str]) -> _Guest:
    objects = [names.snapshots_bucket(app) for app in apps]
    kept = (
        *(names.pause_key(""), names.pause_key("*")),
        *(names.switchover_key("*"), names.fenced_key(">"), names.member_key("*")),
    )
    return _Guest(
        name=operator_user(names.platform),
        variable=OPERATOR_PASSWORD_VARIABLE,
        services=(
            *(names.key_subject(names.platform_bucket, key) for key in kept),
            *(names.key_subject(names.app_bucket(app), key) for app in apps for key in _WORDS),
            # To take them away by force.
            *(
                names.key_subject(bucket, names.lock_key(kind, ">"))
                for bucket in (names.platform_bucket, *(names.app_bucket(app) for app in apps))
                for kind in ("lock", "semaphore")
            ),
            *(names.object_entries(bucket) for bucket in objects),
            *(names.call_subjects(app) for app in apps),
            *(names.event_subject(app, ">") for app in (*apps, None)),
            names.audit_subjects,
        ),
        gathers=(
            f"{names.platform}._.control.>",
            *(names.many_subject(names.call_subjects(app)) for app in apps),
        ),
        streams=(f"{names.platform}.*.watch.>", names.audit_subjects),
        api=(
            "INFO",
            *(f"STREAM.{what}" for what in ("NAMES", "INFO.*", "MSG.GET.*")),
            *("DIRECT.GET.*", "DIRECT.GET.*.>"),
            *(f"CONSUMER.LIST.{names.events_stream(app)}" for app in (*apps, None)),
            f"STREAM.MSG.DELETE.{names.dead_stream}",
            *(f"STREAM.PURGE.{names.object_stream(bucket)}" for bucket in objects),
        ),
    )


def _single_reads(stream: str) -> tuple[str, ...]:
    """Requests that read one stream; its name is in the subject, so they open no other."""
    return (
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
    )


def _batch_reads(stream: str) -> tuple[str, ...]:
    """The direct get that may answer with many messages (``multi_last``, ``batch``)."""
    return (f"$JS.API.DIRECT.GET.{stream}",)


def _discovery(apps: Mapping[str, None]) -> tuple[str, ...]:
    """The NATS micro protocol of these apps: PING, INFO and STATS, of all instances or of one."""
    return tuple(
        f"$SRV.{verb}.{app}{instance}"
        for app in apps
        for verb in ("PING", "INFO", "STATS")
        for instance in ("", ".*")
    )


# --- text


def _exports(guests: Sequence[_Guest]) -> list[str]:
    """Each subject once, with all accounts that may import it: a second export would replace the first."""
    importers: dict[str, list[str]] = {}
    for guest in guests:
        kinds = (
            ('service: "{}"', guest.services),
            ('service: "{}", response_type: stream', (*guest.gathers, *((_WHOLE_API,) if guest.api else ()))),
            ('stream: "{}"', guest.streams),
        )
        for kind, subjects in kinds:
            for subject in subjects:
                importers.setdefault(kind.format(subject), []).append(f'"{guest.name}"')
    return [f"      {{ {what}, accounts: [{', '.join(accounts)}] }}" for what, accounts in importers.items()]


def _account(guest: _Guest, platform: str, passwords: Mapping[str, str]) -> list[str]:
    services = [
        (each, local) for each in (*guest.services, *guest.gathers) for local in _local(each, platform)
    ]
    requests = [local for _, local in services] + [f"$JS.API.{each}" for each in guest.api]
    if guest.api:
        services.append((_WHOLE_API, _WHOLE_API))
    return [
        f'  "{guest.name}" {{',
        f"    users: [ {{ {_login(guest.name, guest.variable, passwords)}",
        "      permissions: {",
        f"        publish: {{ allow: [{_listed(requests)}] }}",
        f"        subscribe: {{ allow: [{_listed(('_INBOX.>', *guest.streams))}] }}",
        "      }",
        "    } ]",
        "    imports: [",
        *(
            f'      {{ service: {{ account: "{platform}", subject: "{each}" }}, to: "{local}" }}'
            for each, local in services
        ),
        *(f'      {{ stream: {{ account: "{platform}", subject: "{each}" }} }}' for each in guest.streams),
        "    ]",
        "  }",
    ]


def _local(subject: str, platform: str) -> list[str]:
    """What a guest calls a service.

    Requests to JetStream get the prefix of a domain with the platform's name, because ``$JS.API.`` in a
    guest's account is answered by its own JetStream, which it has not. Clients that have a domain set
    also write keys under that prefix (the Go client, ``nats --js-domain``) or not (nats-py).
    """
    if subject.startswith("$JS.API."):
        return [subject.replace("$JS.API.", f"$JS.{platform}.API.", 1)]
    if subject.startswith("$KV."):
        return [subject, f"$JS.{platform}.API.{subject}"]
    return [subject]


def _listed(subjects: Sequence[str]) -> str:
    return "".join(f'\n          "{subject}"' for subject in subjects) + "\n        "


def _login(user: str, variable: str, passwords: Mapping[str, str]) -> str:
    secret = passwords.get(user)
    return f'user: "{user}", password: {f"${variable}" if secret is None else _quoted(user, secret)}'


def _quoted(user: str, text: str) -> str:
    if not text.isprintable():
        raise ConfigError(f"password of {user}", "(secret)", "contains control characters", "choose another")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""Writes docs/configuration.md from the declarations: ``python -m phalanx.config.reference [FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from phalanx.config import apps, backends, checks, node, patterns, vip
from phalanx.config.build import VARIABLES
from phalanx.config.databases import SQLite
from phalanx.config.events import Events
from phalanx.config.reader import Field, fields_of, tag_of
from phalanx.config.rules import Bytes, Duration, seconds_text, size_text
from phalanx.config.secret import Secret
from phalanx.decide.backoff import Backoff

_HEAD = """# Configuration

<!-- Written by `python -m phalanx.config.reference docs/configuration.md`: change the declarations. -->

A platform is declared in Python or in a `phalanx.toml`; both mean the same and are checked the same way.
Whatever is wrong is refused before anything starts, in one line that names the key, the value and what
would be right. `phalanx config check FILE` lists everything that is wrong with a file.

```python
from phalanx.config import ActivePassive, HttpCheck, Process, Timings, build_app, build_platform

# What Platform("prod", ...) and platform.app("wiki", ...) do with their arguments:
platform = build_platform("prod", nats="nats://10.0.0.1:4222,nats://10.0.0.2:4222", timings=Timings(ttl="2s"))
wiki = build_app(
    "wiki",
    ActivePassive(priority=10),
    backend=Process("python3 -m http.server 8080", stop_timeout="5s"),
    checks=[HttpCheck("http://127.0.0.1:8080/", interval="500ms")],
)
```

```toml
[platform]
name = "prod"

[nats]
urls = ["nats://10.0.0.1:4222", "nats://10.0.0.2:4222"]

[timings]
ttl = "2s"

[apps.wiki]
pattern = { type = "active-passive", priority = 10 }

[apps.wiki.backend]
type = "process"
command = "python3 -m http.server 8080"
stop_timeout = "5s"

[[apps.wiki.checks]]
type = "http"
url = "http://127.0.0.1:8080/"
interval = "500ms"
```

- **Durations** are seconds (`5`, `0.5`) or text: `"500ms"`, `"5s"`, `"2m"`, `"1h"`, `"7d"`.
- **Sizes** are bytes (`65536`) or text: `"64 MiB"`, `"1 GB"`.
- **Secrets** in a file: instead of `password = "..."` write `password_file = "path"` (a
  line end at its end is not part of the secret) or `password_env = "VARIABLE"`;
  the same for every secret. They are shown as `***` wherever declarations are shown; values of a backend's
  `env` and logins in URLs are hidden too.
- **Nothing is expanded**: `${HOME}`, `$HOME` and `~` stand for themselves. A secret that looks like a
  variable and a path that begins with `~` are refused.
- **Relative paths** count from the folder of the file, in Python from the working directory.
- **Commands** given as text are split like a shell would, but no shell runs them: no pipes, no variables.
  Write `["sh", "-c", "..."]` if you want one.
"""

_ENVIRONMENT = """## Environment

These win over the file and over Python, so that one file or program can serve all nodes. Empty ones count as
not set.
"""

_CHECKS = (
    "`ready` of a process takes one check, which runs until it is healthy for the first time; `depends_on`, "
    "`failures` and `when` mean nothing there."
)

_DATABASE = (
    '`database = "data/wiki.db"` is short for a table with nothing but `path`; `type` may be left out. '
    'In Python `database=` takes `SQLite("data/wiki.db", ...)` or the path alone.'
)

_FENCE = (
    '`fence = "fence-it {node}"` above all sections is short for a table with nothing but `command`. '
    "What it is for: fencing.md."
)

_VIP = (
    '`vip = "10.0.0.9/24"` is short for a table with nothing but `address`; `type` may be left out. In '
    'Python `vip=` takes `VirtualIP("10.0.0.9/24", ...)`, the address alone, or a list of either.'
)

_POOL = "See pool.md. An app of this pattern has no database and no virtual address."

_RING = "See ring.md. An app of this pattern has no backend, no database and no virtual address."

_NATS = (
    "In Python `nats=` takes URLs (one text, or a list), `NatsOptions(...)`, `EmbeddedNats(...)` or "
    '`"embedded"`. In a file write `[nats]` with `urls`, or `[nats.embedded]` (the same as `[nats]` with '
    "`embedded = true`). See nats.md for the choice."
)


def reference() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_environment(), *_sections()]).rstrip() + "\n"


def _environment() -> Iterator[str]:
    yield _ENVIRONMENT
    yield "| variable | meaning |\n|---|---|"
    for name, meaning in VARIABLES.items():
        yield f"| `{name}` | {meaning} |"
    yield ""


def _sections() -> Iterator[str]:
    yield from _section("Platform", "[platform]", node.PlatformConfig)
    yield from _section("NATS servers of your own", "[nats]", node.NatsOptions, _NATS)
    yield from _section("Embedded NATS", "[nats.embedded]", node.EmbeddedNats)
    yield from _section("Timings", "[timings]", node.Timings)
    yield from _section("Fence", "[fence]", node.Fence, _FENCE)
    yield from _section("HTTP", "[http]", node.HttpServer)
    yield from _section("Logging", "[logging]", node.Logging)
    yield from _section("App", "[apps.NAME]", apps.AppConfig)
    yield from _section("Pattern: active-passive", "pattern", apps.ActivePassive)
    yield from _section("Pattern: pool", "pattern", patterns.Pool, _POOL)
    yield from _section("Pattern: ring", "pattern", patterns.Ring, _RING)
    yield from _section("Backend: process", "[apps.NAME.backend]", backends.Process)
    yield from _section("Limits", "[apps.NAME.backend.limits]", backends.Limits)
    yield from _section("Backend: systemd", "[apps.NAME.backend]", backends.Systemd)
    yield from _section("Backend: docker", "[apps.NAME.backend]", backends.Docker)
    yield from _section("Restart", "[apps.NAME.restart]", apps.Restart)
    yield from _section("Virtual IP", "[[apps.NAME.vip]]", vip.VirtualIP, _VIP)
    yield from _section("Events", "[apps.NAME.events]", Events)
    yield from _section("Database: sqlite", "[apps.NAME.database]", SQLite, _DATABASE)
    yield from _section("Health checks", "[[apps.NAME.checks]]", checks.CheckSettings, _CHECKS)
    for kind in checks.CHECKS:
        place = "only in Python" if kind is checks.FunctionCheck else "[[apps.NAME.checks]]"
        yield from _section(f"Check: {tag_of(kind)}", place, kind, without=checks.CheckSettings)
    yield from _section("Hook timeouts", "[apps.NAME.hook_timeouts]", apps.HookTimeouts)
    yield from _section("Retry", "[apps.NAME.retry]", Backoff)


def _section(
    title: str,
    place: str,
    kind: type[msgspec.Struct],
    more: str = "",
    *,
    without: type[msgspec.Struct] | None = None,
) -> Iterator[str]:
    tag = f', `type = "{tag_of(kind)}"`' if tag_of(kind) else ""
    where = place if place.startswith("only") else f"`{place}`{tag}"
    name = "" if kind is checks.CheckSettings else f" `{kind.__name__}` in Python."
    yield f"## {title}\n"
    doc = "\n".join(line.strip() for line in (kind.__doc__ or "").strip().splitlines()).replace("``", "`")
    yield f"{doc}\n\nIn a file: {where}.{name}\n"
    if more:
        yield f"{more}\n"
    yield "| key | meaning | value | default |\n|---|---|---|---|"
    inherited = fields_of(without) if without else {}
    for key, field in fields_of(kind).items():
        if key not in inherited:
            trade_off = f" *{field.about.trade_off}*" if field.about.trade_off else ""
            yield _row(f"`{key}`", field.about.meaning + trade_off, field.about.rule.shape, _default(field))
    yield ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: Field) -> str:
    if field.about.default:
        return field.about.default
    if field.required:
        return "required"
    value = field.default
    if isinstance(field.about.rule, Duration):
        return seconds_text(value)
    if isinstance(field.about.rule, Bytes):
        return size_text(value)
    if value is None or value == "" or value == () or value == Secret():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return f"`{value}`" if isinstance(value, str) else f"{value}"


def main(arguments: list[str]) -> None:
    """Write the page to the file named, or print it."""
    if arguments:
        Path(arguments[0]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])

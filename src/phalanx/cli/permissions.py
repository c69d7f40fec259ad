"""``phalanx nats``: what the NATS servers have to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from phalanx.bus.permissions import render
from phalanx.cli import exits, output
from phalanx.cli.target import DEFAULT_FILE, load
from phalanx.errors import ConfigError

nats = App(name="nats", help="What the NATS servers have to be told.")


@nats.command
def permissions(
    file: Annotated[str | None, Parameter(help="A phalanx.toml, or module:name.")] = None,
    /,
    *,
    platform: Annotated[str | None, Parameter(help="The platform's name, instead of a file.")] = None,
    app: Annotated[list[str] | None, Parameter(help="An app's name; may be given several times.")] = None,
    calls: Annotated[
        list[str] | None,
        Parameter(help="CALLER:APP lets the user of CALLER call APP; may be given several times."),
    ] = None,
    json: Annotated[bool, Parameter(help="As JSON: the text is one field of it.")] = False,
) -> int:
    """Print accounts and permissions for nats-server that keep apps apart.

    The text is to be included in the servers' configuration; passwords come from their environment.
    """
    name, apps = _what(file, platform, app or [])
    text = render(name, apps, calls=_calls(calls or []))
    if json:
        output.emit({"platform": name, "apps": apps, "configuration": text}, pretty=True)
    else:
        print(text, end="" if text.endswith("\n") else "\n")
    return exits.OK


def _calls(pairs: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        caller, colon, called = pair.partition(":")
        if not (caller and colon and called):
            raise ConfigError("--calls", pair, "not CALLER:APP", "write two apps, such as shop:orders")
        found.setdefault(caller, []).append(called)
    return found


def _what(file: str | None, platform: str | None, apps: list[str]) -> tuple[str, list[str]]:
    if platform is not None:
        if file is not None:
            raise ConfigError("--platform", platform, "there is a file too", "give one of them")
        return platform, apps
    if file is None and not Path(DEFAULT_FILE).exists():
        raise ConfigError(
            "--platform", None, f"there is no {DEFAULT_FILE} here", "name a file, or a platform"
        )
    loaded = load(file or DEFAULT_FILE)
    return loaded.config.name, list(dict.fromkeys([*loaded.apps, *apps]))

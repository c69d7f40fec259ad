"""``phalanx config``: look at declarations without starting anything."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from phalanx import preflight
from phalanx.cli import exits, output
from phalanx.cli.target import DEFAULT_FILE, load
from phalanx.config import check_toml
from phalanx.errors import AddressError, BackendError, ConfigError, ConfigFileError
from phalanx.platform import Platform

config = App(name="config", help="Look at a declaration without starting anything.")

Problem = ConfigError | BackendError | AddressError


@config.command
def check(
    file: Annotated[str, Parameter(help="A phalanx.toml, or module:name.")] = DEFAULT_FILE,
    /,
    *,
    other_host: Annotated[
        bool, Parameter(help="It is for another host: do not look for its programs and interfaces here.")
    ] = False,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Say everything that is wrong with a declaration, one line each (then exit code 2).

    Of one that is right in itself also what this host lacks for it: programs, units, images, users,
    interfaces, rights, the fence command. Nothing is made or started.
    """
    errors = _errors(file, other_host=other_host)
    if json:
        output.emit(
            {"file": file, "ok": not errors, "errors": [_plain(error) for error in errors]}, pretty=True
        )
    else:
        for error in errors:
            output.error(error)
        if not errors:
            output.say((f"{file}: ", ""), ("OK", "green"))
    return exits.BAD_INPUT if errors else exits.OK


def _errors(file: str, *, other_host: bool) -> list[Problem]:
    errors: list[Problem] = [*check_toml(file)] if file.endswith(".toml") else []
    if errors:
        return errors
    try:
        platform = load(file)
    except ConfigError as error:
        return [error]
    return [] if other_host else asyncio.run(_of_host(platform))


async def _of_host(platform: Platform) -> list[Problem]:
    fence = platform.config.fence
    found: list[Problem] = []
    if fence is not None and (problem := preflight.fence_problem(fence)) is not None:
        found.append(problem)
    return found + [problem for app in platform.apps.values() for problem in await app.problems()]


def _plain(error: Problem) -> dict[str, object]:
    place = error if isinstance(error, ConfigFileError) else None
    return {
        "key": _key(error),
        "problem": error.problem,
        "remedy": error.remedy,
        "line": place.line if place is not None else 0,
        "column": place.column if place is not None else 0,
        "message": str(error),
    }


def _key(error: Problem) -> str:
    match error:
        case ConfigError():
            return error.key
        case BackendError():
            return f"apps.{error.app}.backend"
        case AddressError():
            return f"apps.{error.app}.vip"

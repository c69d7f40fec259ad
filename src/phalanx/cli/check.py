"""``phalanx config``: look at declarations without starting anything."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import DEFAULT_FILE, load
from phalanx.config import check_toml
from phalanx.errors import ConfigError, ConfigFileError

config = App(name="config", help="Look at a declaration without starting anything.")


@config.command
def check(
    file: Annotated[str, Parameter(help="A phalanx.toml, or module:name.")] = DEFAULT_FILE,
    /,
    *,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Say everything that is wrong with a declaration, one line each (then exit code 2)."""
    errors = _errors(file)
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


def _errors(file: str) -> list[ConfigError]:
    errors = check_toml(file) if file.endswith(".toml") else []
    if errors:
        return errors
    try:
        load(file)
    except ConfigError as error:
        return [error]
    return []


def _plain(error: ConfigError) -> dict[str, object]:
    place = error if isinstance(error, ConfigFileError) else None
    return {
        "key": error.key,
        "problem": error.problem,
        "remedy": error.remedy,
        "line": place.line if place is not None else 0,
        "column": place.column if place is not None else 0,
        "message": str(error),
    }

"""``phalanx``: the entry point. Finds the command, and turns every ending into an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter

from phalanx.cli import exits, output
from phalanx.errors import PhalanxError
from phalanx.version import VERSION

app = App(
    name="phalanx",
    help="High availability for ordinary programs, native to NATS.",
    help_epilogue=exits.EPILOGUE,
    help_format="markdown",
    version=VERSION,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)

COMMANDS = {
    "run": "run:run",
    "dev": "dev:dev",
    "status": "status:status",
    "health": "status:health",
    "stepdown": "stepdown:stepdown",
    "pause": "pause:pause",
    "resume": "pause:resume",
    "switchover": "switchover:switchover",
    "failover": "failover:failover",
    "why": "why:why",
    "call": "call:call",
    "ring": "ring:ring",
    "events": "events:events",
    "app": "app:app",
    "scale": "scale:scale",
    "lock": "lock:lock",
    "audit": "audit:audit",
    "config": "check:config",
    "nats": "permissions:nats",
    "doctor": "doctor:doctor",
    "db": "db:db",
    "snapshot": "snapshot:snapshot",
    "fence": "fence:fence",
    "forget": "forget:forget",
    "recreate-bucket": "recreate:recreate_bucket",
    "version": "about:version",
    "completion": "about:completion",
}
"""Modules are imported when their command is called: `phalanx version` needs no HTTP server."""

for _name, _where in COMMANDS.items():
    app.command(f"phalanx.cli.{_where}", name=_name)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not where a caller ignores it (nohup)
            signal.signal(number, _terminate)
    # Closed by the caller (`>&-`): then Python has None there, and printing would fail.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


_terminated = False
"""Whether it was ended by another signal than that of Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, which removes what is temporary. Commands that go on until they are ended so have
    handlers of their own."""
    global _terminated
    _terminated = True
    interrupt = signal.getsignal(signal.SIGINT)  # asyncio's cancels what runs
    if not callable(interrupt):
        raise KeyboardInterrupt
    interrupt(signal.SIGINT, frame)


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would complain at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.BROKEN_PIPE
    return code


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        import_all()
    try:
        result = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            help_on_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        words = " ".join(word for word in str(error).split())
        output.error(f"{words} See: phalanx {_command(arguments)}--help")
        return exits.BAD_INPUT
    except PhalanxError as error:
        output.error(error)
        return exits.code_of(error)
    except KeyboardInterrupt:
        return exits.TERMINATED if _terminated else exits.INTERRUPTED
    return result if isinstance(result, int) else exits.OK


def import_all() -> None:
    """Import every command, for what describes them all: the list in the help, completion."""
    for name in COMMANDS:
        _ = app[name]


def _command(arguments: Sequence[str]) -> str:
    """The command that was called, as far as there is one of that name."""
    path, here = "", app
    for word in arguments:
        if word.startswith("-") or word not in set(here):
            break
        path, here = f"{path}{word} ", here[word]
    return path


if __name__ == "__main__":
    main()
